#!/usr/bin/env python3
"""Convert checkpoints of the HBONet release to the layout of the Hugging Face Hub."""
import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Optional

import timm
import torch
from model_card import make_card
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import save_for_hf
from tqdm import tqdm

from timm_hbonet.releases import GIT_BLOBS, check_release

# files of a converted checkpoint, as in timm's own repositories
FILES = ('README.md', 'config.json', 'model.safetensors', 'test/rand_tensors.safetensors')


def git_blob_id(content: bytes) -> str:
    """Name that git gives to a file of this content."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def identify(path: Path, name: Optional[str] = None, allow_unknown_digest: bool = False) -> str:
    """Find the released checkpoint that a file is.

    Args:
        path: The file.
        name: Architecture and tag that it must be, None for any.
        allow_unknown_digest: Take a file that is of no release as `name`.

    Returns:
        Architecture and tag.

    Raises:
        ValueError: If the file's digests are not those of one release.
    """
    git_blob = git_blob_id(path.read_bytes())
    found = [k for k, v in GIT_BLOBS.items() if v == git_blob and k == (name or k)]
    if len(found) > 1:
        raise ValueError(f'{path} is the file of {", ".join(found)}. Choose one with --model.')
    if found:
        problem = check_release(path, found[0])
        if problem:
            raise ValueError(f'{path} is not the file of {found[0]}: {problem}')
        return found[0]
    if allow_unknown_digest and name:
        return name
    raise ValueError(
        f'{path} has git blob id {git_blob}, which is not that of {name or "any release"}. Use a file of '
        f'https://github.com/d-li14/HBONet, or, if you know which model it is and trust it, --model NAME '
        f'--allow-unknown-digest.')


def convert(path: Path, name: str, repo_id: str, folder: Path) -> bool:
    """Convert a checkpoint to a folder with the files of a repository of the Hub, and check that it loads again.

    Args:
        path: The checkpoint.
        name: Architecture and tag that it is.
        repo_id: Repository that the model card refers to, 'ORG/NAME'.
        folder: Folder to write. One that exists is never changed.

    Returns:
        Whether the folder was written, False if it has these files already.

    Raises:
        RuntimeError: If the checkpoint cannot be read, does not fit the model, or does not load again as it was.
        FileExistsError: If the folder exists with anything else in it.
    """
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path))).eval()
    except (AttributeError, EOFError, LookupError, RuntimeError, SafetensorError, UnpicklingError, ValueError) as e:
        raise RuntimeError(f'Cannot load {path} as the weights of {name}. {type(e).__name__}: {e}') from e
    # uniform numbers of a few bits, and outputs rounded from float64, are the same on every machine
    images = torch.rand(1, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0)) * 4 - 2
    with torch.inference_mode():
        logits = model(images)
        model.double()
        features = model.forward_features(images.double())
        pre_logits = model.forward_head(features, pre_logits=True)
        tensors = {
            'input': images,
            'features': features.float(),
            'pre_logits': pre_logits.float(),
            'output': model.classifier(pre_logits).float(),
        }
        model.float()

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{folder.name}.', dir=folder.parent) as scratch:
        written = Path(scratch, 'written')
        (written / 'test').mkdir(parents=True)
        save_for_hf(model, str(written), safe_serialization=True)
        config = json.loads((written / 'config.json').read_text())
        config.pop('model_args', None)  # only defaults, with which transformers finds the number of classes twice
        (written / 'config.json').write_text(json.dumps(config, indent=2))
        make_card(name, repo_id, git_blob_id(path.read_bytes())).save(written / 'README.md')
        save_file(tensors, written / 'test/rand_tensors.safetensors')
        for file in written.rglob('*.safetensors'):
            shutil.copymode(written / 'config.json', file)  # safetensors makes its files private

        reloaded = timm.create_model(f'local-dir:{written}', pretrained=True).eval()
        with torch.inference_mode():
            if not torch.equal(reloaded(images), logits):
                raise RuntimeError(f'The converted {name} does not give the logits of {path}. Nothing is kept.')
        if not folder.is_dir() or not any(folder.iterdir()):
            os.rename(written, folder)  # fails where there is a file, or by now a folder with files
            return True
        for file in FILES:
            if not (folder / file).is_file() or (folder / file).read_bytes() != (written / file).read_bytes():
                raise FileExistsError(f'{folder} exists, with another {file} or none. Choose another, or move it away.')
        return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='Each file becomes a folder DIR/MODEL with model.safetensors, config.json, README.md (the model card, '
               'for the namespace TIMM_HBONET_HUB_NAMESPACE) and test/rand_tensors.safetensors. The git blob id of the '
               'file tells which model it is. A folder appears when it is complete and loads through timm to '
               'identical logits. One that exists is never changed: if its files differ, that is an error.')
    parser.add_argument('files', nargs='+', type=Path, metavar='FILE', help='checkpoint of the release')
    parser.add_argument('--output', type=Path, default='.', metavar='DIR', help='folder of the folders (default: here)')
    parser.add_argument(
        '--model', choices=list(GIT_BLOBS), metavar='NAME',
        help='model that the FILE must be, such as hbonet_100.in1k')
    parser.add_argument(
        '--allow-unknown-digest', action='store_true',
        help='convert a FILE that is not of the release, as --model; its card claims no accuracy')
    args = parser.parse_args()
    if args.model and len(args.files) > 1:
        parser.error('--model takes a single FILE')
    if args.allow_unknown_digest and not args.model:
        parser.error('--allow-unknown-digest needs --model')

    namespace = (os.environ.get('TIMM_HBONET_HUB_NAMESPACE') or 'timm').partition('@')[0]
    for path in tqdm(args.files, unit='file', disable=len(args.files) == 1):
        try:
            name = identify(path, args.model, args.allow_unknown_digest)
            folder = args.output / name
            done = '' if convert(path, name, f'{namespace}/{name}', folder) else ' (was there already)'
        except (OSError, RuntimeError, ValueError) as e:
            sys.exit(f'error: {" ".join(str(e).split())}')
        tqdm.write(f'{folder}{done}')


if __name__ == '__main__':
    main()
