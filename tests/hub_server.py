"""A small Hugging Face Hub on loopback, for the real huggingface_hub client to talk to.

It serves and stores model repositories (without Xet: set HF_HUB_DISABLE_XET=1), plays other sites through `pages`, acts
as an HTTP proxy for plain http addresses (and refuses https), logs its requests, and misbehaves where `fail` tells it.

    with HubServer() as server:
        server.add_repository('org/name', {'config.json': b'{}'})
        server.fail('*/resolve/*', status=500, times=1)
        subprocess.run(command, env={**os.environ, 'HF_ENDPOINT': server.url, 'HF_TOKEN': TOKEN})
        assert server.count('*/resolve/*', 'GET') == 1
"""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, Mapping, Optional, Tuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = 'hf_' + 'x' * 34
USER = 'maintainer'
ORGANIZATIONS = ('org', 'timm')
LFS_SUFFIXES = ('.bin', '.pth', '.safetensors')


@dataclass
class Request:
    """A request that the server got: method, decoded path without query, and headers by lower-case name."""
    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Fault:
    """What goes wrong with requests whose path matches `pattern` (shell style), `times` times or always.

    Attributes:
        status: Answer with this HTTP status.
        cut: Break the connection after this many bytes of the file sent, or of the upload received.
        hang: Never answer.
        barrier: Answer when as many requests have come as it takes.
        content: Send this instead of the file.
        headers: Headers that go with `status`.
    """
    pattern: str
    method: Optional[str] = None
    status: Optional[int] = None
    cut: Optional[int] = None
    hang: bool = False
    barrier: Optional[threading.Barrier] = None
    content: Optional[bytes] = None
    headers: Mapping[str, str] = field(default_factory=dict)
    times: Optional[int] = None


class Repository:
    """Files by path for each commit, and commits by branch or tag."""

    def __init__(self) -> None:
        self.commits = {}
        self.refs = {}
        self.commit('main', {})

    def commit(self, revision: str, files: Dict[str, bytes]) -> str:
        parent = self.refs.get(revision, '')
        tree = [(path, _sha1(content)) for path, content in files.items()]  # clients take a commit for its content
        digest = _sha1(f'{parent}{len(self.commits)}{tree}'.encode())
        self.commits[digest] = dict(files)
        self.refs[revision] = digest
        return digest

    def find(self, revision: str) -> Optional[str]:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None


class HubServer:
    """The server. It listens on a free port of 127.0.0.1 while the context lasts.

    Attributes:
        url: Address, for HF_ENDPOINT and http_proxy.
        repositories: Repositories by id.
        pages: Contents of other sites by path, such as '/owner/name/raw/commit/path'.
        requests: All requests so far.
        tokens: Tokens that are valid, they belong to `USER` of `ORGANIZATIONS`.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.repositories: Dict[str, Repository] = {}
        self.pages: Dict[str, bytes] = {}
        self.requests: List[Request] = []
        self.tokens = {TOKEN}
        self.faults: List[Fault] = []
        self.large_files: Dict[str, bytes] = {}

    def __enter__(self) -> 'HubServer':
        handler = type('Handler', (_Handler,), {'hub': self})
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self._server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self._server.server_port}'
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def add_repository(self, repo_id: str, files: Mapping[str, bytes], revision: str = 'main') -> str:
        """Create a repository, or a revision of it, with exactly these files. Returns the commit."""
        return self.repositories.setdefault(repo_id, Repository()).commit(revision, dict(files))

    def files(self, repo_id: str, revision: str = 'main') -> Dict[str, bytes]:
        """Files of a repository by path."""
        repository = self.repositories[repo_id]
        return repository.commits[repository.find(revision)]

    def fail(self, pattern: str, method: Optional[str] = None, **fault: Any) -> None:
        """Let requests fail, see `Fault`."""
        self.faults.append(Fault(pattern, method, **fault))

    def count(self, pattern: str = '*', method: Optional[str] = None) -> int:
        """Number of requests so far whose path matches."""
        return sum(fnmatchcase(r.path, pattern) and method in (None, r.method) for r in list(self.requests))

    def _next_fault(self, method: str, path: str) -> Optional[Fault]:
        with self.lock:
            for fault in self.faults:
                if fnmatchcase(path, fault.pattern) and fault.method in (None, method) and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None


class _HttpError(Exception):
    def __init__(self, status: int, message: str, code: str = '', **headers: str) -> None:
        self.status, self.message = status, message
        self.headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {}), **headers}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        parts = urlsplit(self.path)  # of a proxy request, the whole address
        path = unquote(parts.path)
        self.query = parse_qs(parts.query)
        self.fault = self.hub._next_fault(self.command, path) or Fault(path)
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        try:
            if self.fault.hang:
                self.hub.closing.wait()
                self.close_connection = True
                return
            if self.fault.barrier is not None:
                self.fault.barrier.wait(60)
            self.body = self._read_body()
            if self.fault.status:
                raise _HttpError(self.fault.status, 'fault on request', **self.fault.headers)
            self._check_token()
            self._route(parts.path, path)
        except _HttpError as e:
            self._send_json({'error': e.message}, e.status, e.headers)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def do_CONNECT(self) -> None:
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, {}))
        self.send_error(502, 'This proxy has no way to there')

    def _read_body(self) -> bytes:
        length = int(self.headers.get('Content-Length', 0))
        if length and self.fault.cut is not None:
            self.rfile.read(min(length, self.fault.cut))
            raise ConnectionError
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(length)
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(chunks)

    def _check_token(self) -> None:
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        self.signed_in = token in self.hub.tokens
        if token and not self.signed_in:
            raise _HttpError(401, 'Invalid credentials in Authorization header')

    def _route(self, raw_path: str, path: str) -> None:
        if path in self.hub.pages:
            return self._send_file(self.hub.pages[path], {})
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, raw_path)
            if match and self.command in method.split():
                # a quoted slash belongs to a revision
                return action(self, **{k: v and unquote(v) for k, v in match.groupdict().items()})
        raise _HttpError(404, f'{self.command} {path} is unknown here')

    def _send(self, content: bytes, status: int = 200, headers: Optional[Mapping[str, str]] = None) -> None:
        self.send_response(status)
        for k, v in {'Content-Length': str(len(content)), **(headers or {})}.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != 'HEAD':
            if self.fault.cut is not None:
                self.wfile.write(content[:self.fault.cut])
                raise ConnectionError
            self.wfile.write(content)

    def _send_json(self, value: Any, status: int = 200, headers: Optional[Mapping[str, str]] = None) -> None:
        self._send(json.dumps(value).encode(), status, {'Content-Type': 'application/json', **(headers or {})})

    def _send_file(self, content: bytes, headers: Mapping[str, str]) -> None:
        if self.fault.content is not None:
            content = self.fault.content
        asked = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if not asked:
            return self._send(content, 200, {'Accept-Ranges': 'bytes', **headers})
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            return self._send(b'', 416, {'Content-Range': f'bytes */{len(content)}'})
        part = content[first:last + 1]
        return self._send(part, 206, {'Content-Range': f'bytes {first}-{last}/{len(content)}', **headers})

    def _repository(self, repo_id: str) -> Repository:
        if repo_id not in self.hub.repositories:
            if not self.signed_in:  # the Hub doesn't tell strangers what exists
                raise _HttpError(401, 'Invalid username or password.')
            raise _HttpError(404, 'Repository not found', 'RepoNotFound')
        return self.hub.repositories[repo_id]

    def _commit(self, repo_id: str, revision: Optional[str]) -> Tuple[str, Dict[str, bytes]]:
        repository = self._repository(repo_id)
        commit = repository.find(revision or 'main')
        if commit is None:
            raise _HttpError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return commit, repository.commits[commit]

    def _require_write(self, repo_id: str) -> None:
        if not self.signed_in:
            raise _HttpError(401, 'Invalid username or password.')
        if repo_id.split('/')[0] not in (USER, *ORGANIZATIONS):
            raise _HttpError(403, f'You have no write access to {repo_id}')

    # reading

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit, files = self._commit(repo_id, revision)
        if path not in files:
            raise _HttpError(404, 'Entry not found', 'EntryNotFound', **{'X-Repo-Commit': commit})
        entry = _entry(path, files[path])
        headers = {'X-Repo-Commit': commit, 'ETag': f'"{entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]}"'}
        if 'lfs' in entry:
            headers.update({'X-Linked-ETag': headers['ETag'], 'X-Linked-Size': str(entry['size'])})
        self._send_file(files[path], headers)

    def model_info(self, repo_id: str, revision: Optional[str] = None) -> None:
        commit, files = self._commit(repo_id, revision)
        siblings = []
        for path, content in files.items():
            entry = _entry(path, content)
            blob = {'size': entry['size'], 'blobId': entry['oid']}
            if 'lfs' in entry:
                blob['lfs'] = {**entry['lfs'], 'sha256': entry['lfs']['oid']}
            siblings.append({'rfilename': path, **(blob if 'blobs' in self.query else {})})
        card = re.match(r'---\n(.*?)\n---', files.get('README.md', b'').decode(), re.DOTALL)
        data = yaml.safe_load(card[1]) if card else {}
        self._send_json({
            'id': repo_id, 'modelId': repo_id, 'sha': commit, 'private': False, 'downloads': 0, 'likes': 0,
            'tags': data.get('tags', []), 'pipeline_tag': data.get('pipeline_tag'),
            'library_name': data.get('library_name'), 'cardData': data, 'siblings': siblings,
        })

    def tree(self, repo_id: str, revision: str, path: Optional[str] = None) -> None:
        _, files = self._commit(repo_id, revision)
        prefix = f'{path}/' if path else ''
        found = {k: v for k, v in files.items() if k.startswith(prefix)}
        if prefix and not found:
            raise _HttpError(404, 'Entry not found', 'EntryNotFound')
        entries = {}
        for name, content in sorted(found.items()):
            folders = name[len(prefix):].split('/')[:-1]
            for i in range(len(folders)):
                folder = prefix + '/'.join(folders[:i + 1])
                entries[folder] = {'type': 'directory', 'path': folder, 'size': 0, 'oid': _sha1(folder.encode())}
            entries[name] = _entry(name, content)
        if self.query.get('recursive', [''])[0].lower() not in ('true', '1'):
            entries = {k: v for k, v in entries.items() if '/' not in k[len(prefix):]}
        self._send_json(list(entries.values()))

    def paths_info(self, repo_id: str, revision: str) -> None:
        _, files = self._commit(repo_id, revision)
        if 'json' in self.headers.get('Content-Type', ''):
            paths = json.loads(self.body)['paths']
        else:
            paths = parse_qs(self.body.decode()).get('paths', [])
        self._send_json([_entry(path, files[path]) for path in paths if path in files])

    def refs(self, repo_id: str) -> None:
        branches = [
            {'name': name, 'ref': f'refs/heads/{name}', 'targetCommit': commit}
            for name, commit in self._repository(repo_id).refs.items()]
        self._send_json({'branches': branches, 'converts': [], 'tags': []})

    def whoami(self) -> None:
        if not self.signed_in:
            raise _HttpError(401, 'Invalid username or password.')
        self._send_json({
            'type': 'user', 'id': '0', 'name': USER, 'fullname': USER, 'isPro': False,
            'orgs': [{'type': 'org', 'id': name, 'name': name, 'roleInOrg': 'admin'} for name in ORGANIZATIONS],
            'auth': {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': 'write'}},
        })

    # writing

    def create(self) -> None:
        payload = json.loads(self.body)
        repo_id = f'{payload.get("organization") or USER}/{payload["name"]}'
        self._require_write(repo_id)
        exists = repo_id in self.hub.repositories
        if not exists:
            self.hub.add_repository(repo_id, {'.gitattributes': b'*.safetensors filter=lfs\n'})
        answer = {'url': f'{self.hub.url}/{repo_id}', 'name': repo_id, 'id': repo_id}
        self._send_json({**answer, 'error': 'You already created this model repo'} if exists else answer,
                        409 if exists else 200)

    def create_branch(self, repo_id: str, branch: str) -> None:
        self._require_write(repo_id)
        repository = self._repository(repo_id)
        if branch in repository.refs:
            raise _HttpError(409, 'Reference already exists')
        start = json.loads(self.body or '{}').get('startingPoint')
        repository.refs[branch] = self._commit(repo_id, start)[0]
        self._send_json({}, 201)

    def preupload(self, repo_id: str, revision: str) -> None:
        self._require_write(repo_id)
        _, files = self._commit(repo_id, revision)
        entries = {path: _entry(path, content) for path, content in files.items()}
        oids = {path: entry.get('lfs', entry)['oid'] for path, entry in entries.items()}  # SHA-256 of a large file
        self._send_json({'files': [
            {
                'path': file['path'],
                'uploadMode': 'lfs' if file['path'].endswith(LFS_SUFFIXES) else 'regular',
                'shouldIgnore': False,
                'oid': oids.get(file['path']),
            } for file in json.loads(self.body)['files']]})

    def lfs_batch(self, repo_id: str) -> None:
        self._require_write(repo_id)
        self._repository(repo_id)
        objects = []
        for item in json.loads(self.body)['objects']:
            answer = {'oid': item['oid'], 'size': item['size']}
            if item['oid'] not in self.hub.large_files:
                answer['actions'] = {
                    'upload': {'href': f'{self.hub.url}/lfs/{item["oid"]}'},
                    'verify': {'href': f'{self.hub.url}/{repo_id}.git/info/lfs/verify'},
                }
            objects.append(answer)
        self._send_json({'transfer': 'basic', 'objects': objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _HttpError(400, 'The content does not have this digest')
        self.hub.large_files[oid] = self.body
        self._send(b'')

    def lfs_verify(self, repo_id: str) -> None:
        if json.loads(self.body)['oid'] not in self.hub.large_files:
            raise _HttpError(404, 'No such object')
        self._send_json({})

    def commit(self, repo_id: str, revision: str) -> None:
        self._require_write(repo_id)
        parent, files = self._commit(repo_id, revision)
        files, summary = dict(files), ''
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item['key'], item['value']
            if key == 'header':
                summary = value['summary']
                if value.get('parentCommit', parent) != parent:
                    raise _HttpError(412, 'A commit has happened since. Please refresh and try again.')
            elif key == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif key == 'lfsFile':
                if value['oid'] not in self.hub.large_files:
                    raise _HttpError(400, f'LFS pointer pointed to a file that does not exist: {value["path"]}')
                files[value['path']] = self.hub.large_files[value['oid']]
            elif key == 'deletedFile':
                files.pop(value['path'])
            elif key == 'deletedFolder':
                files = {k: v for k, v in files.items() if not k.startswith(value['path'].rstrip('/') + '/')}
        with self.hub.lock:
            oid = self.hub.repositories[repo_id].commit(revision, files)
        url = f'{self.hub.url}/{repo_id}/commit/{oid}'
        self._send_json({'success': True, 'commitOid': oid, 'commitUrl': url, 'commitMessage': summary})

    def validate_yaml(self) -> None:
        card = re.match(r'---\n(.*?)\n---', json.loads(self.body)['content'], re.DOTALL)
        try:
            valid = card is not None and isinstance(yaml.safe_load(card[1]), dict)
        except yaml.YAMLError:
            valid = False
        errors = [] if valid else [{'message': 'The metadata is not valid YAML'}]
        self._send_json({'errors': errors, 'warnings': []}, 400 if errors else 200)


_ID = r'(?P<repo_id>[^/]+/[^/]+)'
_REVISION = r'(?P<revision>[^/]+)'
_ROUTES = (
    ('GET HEAD', rf'/{_ID}/resolve/{_REVISION}/(?P<path>.+)', _Handler.resolve),
    ('GET', rf'/api/models/{_ID}(/revision/{_REVISION})?', _Handler.model_info),
    ('GET', rf'/api/models/{_ID}/tree/{_REVISION}(/(?P<path>.+))?', _Handler.tree),
    ('POST', rf'/api/models/{_ID}/paths-info/{_REVISION}', _Handler.paths_info),
    ('GET', rf'/api/models/{_ID}/refs', _Handler.refs),
    ('GET', '/api/whoami-v2', _Handler.whoami),
    ('POST', '/api/repos/create', _Handler.create),
    ('POST', rf'/api/models/{_ID}/branch/(?P<branch>[^/]+)', _Handler.create_branch),
    ('POST', rf'/api/models/{_ID}/preupload/{_REVISION}', _Handler.preupload),
    ('POST', rf'/{_ID}\.git/info/lfs/objects/batch', _Handler.lfs_batch),
    ('POST', rf'/{_ID}\.git/info/lfs/verify', _Handler.lfs_verify),
    ('PUT', r'/lfs/(?P<oid>[0-9a-f]{64})', _Handler.lfs_put),
    ('POST', rf'/api/models/{_ID}/commit/{_REVISION}', _Handler.commit),
    ('POST', '/api/validate-yaml', _Handler.validate_yaml),
)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def git_blob_id(content: bytes) -> str:
    """Name that git gives to a file of this content."""
    return _sha1(b'blob %d\0' % len(content) + content)


def _entry(path: str, content: bytes) -> Dict[str, Any]:
    """A file as the Hub's listings show it."""
    entry = {'type': 'file', 'path': path, 'size': len(content), 'oid': git_blob_id(content)}
    if path.endswith(LFS_SUFFIXES):
        oid = hashlib.sha256(content).hexdigest()
        pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n'.encode()
        entry.update(oid=git_blob_id(pointer), lfs={'oid': oid, 'size': len(content), 'pointerSize': len(pointer)})
    return entry
