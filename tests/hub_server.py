"""A small Hugging Face Hub on loopback, as far as the real huggingface_hub client asks for it here.

It serves and stores model repositories, has pages of another site, logs its requests, and misbehaves where `fail` tells
it. Set HF_HUB_DISABLE_XET=1.
"""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, Mapping, NamedTuple, Optional
from urllib.parse import unquote, urlsplit

TOKEN = 'hf_' + 'x' * 34
USER = 'maintainer'


class Request(NamedTuple):
    """A request that the server got. Its path is decoded, without query."""
    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Fault:
    """What goes wrong with requests whose path matches `pattern` (shell style).

    Attributes:
        status: Answer with this HTTP status.
        cut: Break the connection after this many bytes of the file sent, or before an upload is stored.
        hang: Never answer.
        barrier: Answer when as many requests have come as it takes.
        content: Send this instead of the page.
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


class HubServer:
    """The server. It listens on a free port of 127.0.0.1 while the context lasts.

    Attributes:
        url: Address, for HF_ENDPOINT.
        repositories: Contents of files by id of the repository, revision, and path.
        pages: Contents of the other site by path, such as '/owner/name/raw/commit/path'.
        requests: All requests so far.
        tokens: Tokens that are valid, they belong to `USER`.
    """

    def __init__(self) -> None:
        self.closing = threading.Event()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.repositories: Dict[str, Dict[str, Dict[str, bytes]]] = {}
        self.pages: Dict[str, bytes] = {}
        self.requests: List[Request] = []
        self.tokens = {TOKEN}
        self.faults: List[Fault] = []

    def __enter__(self) -> 'HubServer':
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self._server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self._server.server_port}'
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def add_repository(self, repo_id: str, files: Mapping[str, bytes], revision: str = 'main') -> None:
        """Create a repository, or a revision of it, with exactly these files."""
        self.repositories.setdefault(repo_id, {'main': {}})[revision] = dict(files)

    def files(self, repo_id: str) -> Dict[str, bytes]:
        """Files of a repository by path."""
        return self.repositories[repo_id]['main']

    def fail(self, pattern: str, method: Optional[str] = None, **fault: Any) -> None:
        """Let requests fail, see `Fault`."""
        self.faults.append(Fault(pattern, method, **fault))

    def count(self, pattern: str = '*', method: Optional[str] = None) -> int:
        """Number of requests so far whose path matches."""
        return sum(fnmatchcase(r.path, pattern) and method in (None, r.method) for r in list(self.requests))


class _HttpError(Exception):
    def __init__(self, status: int, message: str, code: str = '', **headers: str) -> None:
        self.status = status
        self.headers = {'X-Error-Message': message, 'X-Error-Code': code, **headers}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        raw_path = urlsplit(self.path).path
        path = unquote(raw_path)
        matching = [f for f in self.hub.faults if fnmatchcase(path, f.pattern) and f.method in (None, self.command)]
        self.fault = matching[0] if matching else Fault(path)
        self.hub.requests.append(Request(self.command, path, self.headers))
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        try:
            if self.fault.hang:
                self.hub.closing.wait()
            if self.fault.barrier is not None:
                self.fault.barrier.wait(60)
            if self.fault.hang or self.body and self.fault.cut is not None:
                raise ConnectionError
            if self.fault.status:
                raise _HttpError(self.fault.status, 'fault on request', **self.fault.headers)
            token = self.headers.get('Authorization', '').removeprefix('Bearer ')
            self.signed_in = token in self.hub.tokens
            if token and not self.signed_in:
                raise _HttpError(401, 'Invalid credentials in Authorization header')
            self._route(raw_path, path)
        except _HttpError as e:
            self._send(b'{}', e.status, e.headers)
        except ConnectionError:
            self.close_connection = True

    do_HEAD = do_POST = do_GET

    def _route(self, raw_path: str, path: str) -> None:
        if path in self.hub.pages:
            return self._send(self.hub.pages[path] if self.fault.content is None else self.fault.content)
        for pattern, action in _ROUTES.items():
            if match := re.fullmatch(pattern, raw_path):
                # a quoted slash belongs to a revision
                return action(self, **{k: unquote(v) for k, v in match.groupdict().items()})
        raise _HttpError(404, f'{path} is unknown here')

    def _send(self, content: bytes, status: int = 200, headers: Optional[Mapping[str, str]] = None) -> None:
        self.send_response(status)
        for k, v in {'Content-Length': str(len(content)), **(headers or {})}.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content[:self.fault.cut])
            if self.fault.cut is not None:
                raise ConnectionError

    def _send_json(self, status: int = 200, **value: Any) -> None:
        self._send(json.dumps(value).encode(), status, {'Content-Type': 'application/json'})

    def _files(self, repo_id: str, revision: str) -> Dict[str, bytes]:
        if not self.signed_in and (repo_id not in self.hub.repositories or self.command == 'POST'):
            raise _HttpError(401, 'Invalid username or password.')  # the Hub doesn't tell strangers what exists
        if repo_id not in self.hub.repositories:
            raise _HttpError(404, 'Repository not found', 'RepoNotFound')
        if revision not in self.hub.repositories[repo_id]:
            raise _HttpError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return self.hub.repositories[repo_id][revision]

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        files = self._files(repo_id, revision)
        headers = {'X-Repo-Commit': _commit_id(files)}
        if path not in files:
            raise _HttpError(404, 'Entry not found', 'EntryNotFound', **headers)
        self._send(files[path], headers={**headers, 'ETag': f'"{git_blob_id(files[path])}"'})

    def model_info(self, repo_id: str, revision: str) -> None:
        self._send_json(id=repo_id, sha=_commit_id(self._files(repo_id, revision)), siblings=[], tags=[])

    def whoami(self) -> None:
        if not self.signed_in:
            raise _HttpError(401, 'Invalid username or password.')
        self._send_json(type='user', name=USER, orgs=[])

    def create(self) -> None:
        payload = json.loads(self.body)
        repo_id = f'{payload.get("organization") or USER}/{payload["name"]}'
        exists = repo_id in self.hub.repositories
        if not exists:
            self.hub.add_repository(repo_id, {'.gitattributes': b''})
        self._send_json(409 if exists else 200, url=f'{self.hub.url}/{repo_id}', id=repo_id)

    def preupload(self, repo_id: str, revision: str) -> None:
        files = self._files(repo_id, revision)
        paths = [file['path'] for file in json.loads(self.body)['files']]
        # the client sends contents in its commit, but those that are there already
        answers = {'uploadMode': 'regular', 'shouldIgnore': False}
        self._send_json(files=[
            {**answers, 'path': path, 'oid': git_blob_id(files[path]) if path in files else None} for path in paths])

    def commit(self, repo_id: str, revision: str) -> None:
        files = dict(self._files(repo_id, revision))
        for item in map(json.loads, self.body.splitlines()):
            if item['key'] == 'file':
                files[item['value']['path']] = base64.b64decode(item['value']['content'])
        self.hub.add_repository(repo_id, files, revision)
        commit_id = _commit_id(files)
        self._send_json(success=True, commitOid=commit_id, commitUrl=f'{self.hub.url}/{repo_id}/commit/{commit_id}')

    def validate_yaml(self) -> None:
        self._send_json(errors=[], warnings=[])


_ID, _REVISION = r'(?P<repo_id>[^/]+/[^/]+)', r'(?P<revision>[^/]+)'
_ROUTES = {
    rf'/{_ID}/resolve/{_REVISION}/(?P<path>.+)': _Handler.resolve,
    rf'/api/models/{_ID}/revision/{_REVISION}': _Handler.model_info,
    r'/api/whoami-v2': _Handler.whoami,
    r'/api/repos/create': _Handler.create,
    rf'/api/models/{_ID}/preupload/{_REVISION}': _Handler.preupload,
    rf'/api/models/{_ID}/commit/{_REVISION}': _Handler.commit,
    r'/api/validate-yaml': _Handler.validate_yaml,
}


def git_blob_id(content: bytes) -> str:
    """Name that git gives to a file of this content."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def _commit_id(files: Mapping[str, bytes]) -> str:
    tree = [(path, git_blob_id(content)) for path, content in files.items()]
    return hashlib.sha1(repr(tree).encode()).hexdigest()
