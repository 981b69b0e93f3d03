#!/usr/bin/env python3
"""Publish the released HBONet checkpoints on the Hugging Face Hub."""
import argparse
import hashlib
import sys
import tempfile
from http.client import HTTPException
from pathlib import Path
from typing import Optional

from convert_checkpoint import FILES, convert, git_blob_id
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from tqdm import tqdm

from timm_hbonet import __version__
from timm_hbonet.releases import GIT_BLOBS, download_release

# of files, connections and the Hub, whose client has another HTTP library in each of its major versions
ERRORS = (OSError, HTTPException, *HfHubHTTPError.__bases__)


def publish(api: HfApi, name: str, repo_id: str) -> str:
    """Upload a released checkpoint, as far as the repository does not have it. Returns what was done."""
    try:
        remote = {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in api.get_paths_info(repo_id, list(FILES))}
        exists = True
    except RepositoryNotFoundError:
        remote, exists = {}, False
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, name)
        convert(download_release(name), name, repo_id, folder)
        changed = []
        for file in FILES:
            content = (folder / file).read_bytes()
            if remote.get(file) not in (git_blob_id(content), hashlib.sha256(content).hexdigest()):
                changed.append(file)
        if not changed:
            return 'is up to date'
        if not exists:
            api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=changed, commit_message=f'Add {name}')
    return f'uploaded {", ".join(changed)}'


def check_token(api: HfApi) -> Optional[str]:
    """What is wrong with the token, None if nothing."""
    try:
        api.whoami()
    except LocalTokenNotFoundError:
        return 'there is no token of the Hub. Run `hf auth login`, or set HF_TOKEN to a token with write access.'
    except ERRORS as e:
        if getattr(getattr(e, 'response', None), 'status_code', None) == 401:
            return (
                f'{api.endpoint} does not accept the token (401), it may have expired or been revoked. '
                f'Run `hf auth login`, or set HF_TOKEN to a token with write access.')
        return f'cannot ask {api.endpoint} whose token this is. {describe(e)}'
    return None


def describe(error: BaseException) -> str:
    """One line about an error and its cause, without the token that a request may have had."""
    message = ' '.join(f'{type(error).__name__}: {error}'.split())
    # an HTTP error of the Hub says it all
    if error.__cause__ and not isinstance(error, HfHubHTTPError) and str(error.__cause__) not in message:
        message += f' ({describe(error.__cause__)})'
    token = get_token()
    return message.replace(token, '***') if token else message


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='Each checkpoint is downloaded from the release (or taken from the cache), verified, converted, and '
               'uploaded to the repository ORG/MODEL, unless that has it already. It is safe to run this again after '
               'any failure. The token is that of `hf auth login`, or HF_TOKEN.')
    parser.add_argument('--namespace', metavar='ORG', help='organization or user of the Hub')
    parser.add_argument('--only', nargs='+', metavar='NAME', help='publish only these models, such as hbonet_100.in1k')
    parser.add_argument('--dry-run', type=Path, metavar='DIR', help='write the folders to DIR, upload nothing')
    args = parser.parse_args()
    if not args.namespace and not args.dry_run:
        parser.error('--namespace is required, unless this is a --dry-run')
    for name in args.only or ():
        if name not in GIT_BLOBS:
            parser.error(f'--only: there is no model {name!r}, choose from {", ".join(GIT_BLOBS)}')

    api = HfApi(library_name='timm_hbonet', library_version=__version__)
    problem = None if args.dry_run else check_token(api)
    if problem:
        sys.exit(f'error: {problem}')

    failures = []
    names = [name for name in GIT_BLOBS if name in (args.only or GIT_BLOBS)]
    for name in tqdm(names, unit='model'):
        repo_id = f'{args.namespace or "timm"}/{name}'
        try:
            if not args.dry_run:
                done = publish(api, name, repo_id)
            elif convert(download_release(name), name, repo_id, args.dry_run / name):
                done = f'written to {args.dry_run / name}'
            else:
                done = f'was there already, in {args.dry_run / name}'
            tqdm.write(f'{repo_id}: {done}')
        except (*ERRORS, RuntimeError, ValueError) as e:  # must not keep the others from being published
            failures.append(f'{name}: {describe(e)}')
    if failures:
        remedy = 'to write' if args.dry_run else 'to publish'
        failures.insert(0, f'error: {len(failures)} of {len(names)} failed, run this again {remedy} them:')
        sys.exit('\n'.join(failures))


if __name__ == '__main__':
    main()
