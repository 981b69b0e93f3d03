#!/usr/bin/env python3
"""Convert checkpoints of the HBONet release to the layout of the Hugging Face Hub."""
import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Optional

import timm
import torch
from model_card import make_card
from safetensors.torch import save_file
from timm.models import save_for_hf

import timm_hbonet  # noqa: F401  registers the models
from timm_hbonet.releases import RELEASES, REPOSITORY, Release

# files of a converted checkpoint, as in timm's own repositories
FILES = ('README.md', 'config.json', 'model.safetensors', 'test/rand_tensors.safetensors')


def git_blob_id(content: bytes) -> str:
    """Name that git gives to a file of this content."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def identify(path: Path, name: Optional[str] = None, allow_unknown_digest: bool = False) -> Release:
    """Find the release that a file is.

    Args:
        path: The file.
        name: Name that the release must have, None for any.
        allow_unknown_digest: Take a file that is of no release as the model `name`.

    Raises:
        ValueError: If the file's digests are not those of one release.
    """
    git_blob = git_blob_id(path.read_bytes())
    found = [r for r in RELEASES if r.git_blob == git_blob and r.name == (name or r.name)]
    if len(found) > 1:
        raise ValueError(f'{path} is the file of {", ".join(r.name for r in found)}. Choose one with --model.')
    if found:
        found[0].verify(path)
        return found[0]
    if allow_unknown_digest:
        return next(r for r in RELEASES if r.name == name)
    raise ValueError(
        f'{path} has git blob id {git_blob}, which is not that of {name or "any release"}. Use a file of {REPOSITORY}, '
        f'or, if you know which model it is and trust it, --model NAME --allow-unknown-digest.')


def convert(path: Path, release: Release, repo_id: str, folder: Path) -> None:
    """Convert a checkpoint to a folder with the files of a repository of the Hub, and check that it loads again.

    Args:
        path: The checkpoint.
        release: The release that it is.
        repo_id: Repository that the model card refers to, 'ORG/NAME'.
        folder: Folder to write. If it exists, it is replaced.

    Raises:
        RuntimeError: If the checkpoint cannot be read, does not fit the model, or does not load again as it was.
        FileExistsError: If the folder has files that are not of a converted checkpoint.
    """
    files = [p for p in (folder, *folder.rglob('*')) if p.is_file()]
    others = [p for p in files if p.relative_to(folder).as_posix() not in FILES]
    if others:
        raise FileExistsError(f'{folder} has other files, such as {others[0].name}. Choose another, or move them.')
    model = timm.create_model(release.name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path))).eval()
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
        make_card(model, release, repo_id, git_blob_id(path.read_bytes())).save(written / 'README.md')
        save_file(tensors, written / 'test/rand_tensors.safetensors')
        for file in written.rglob('*.safetensors'):
            shutil.copymode(written / 'config.json', file)  # safetensors makes its files private

        reloaded = timm.create_model(f'local-dir:{written}', pretrained=True).eval()
        with torch.inference_mode():
            if not torch.equal(reloaded(images), logits):
                raise RuntimeError(f'The converted {release.name} does not give the logits of {path}. Nothing is kept.')
        if folder.exists():
            folder.rename(Path(scratch, 'replaced'))
        written.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='Each file becomes a folder DIR/MODEL with model.safetensors, config.json, README.md (the model card, '
               'for the namespace TIMM_HBONET_HUB_NAMESPACE) and test/rand_tensors.safetensors. The git blob id of the '
               'file tells which model it is. A folder appears when it is complete and loads through timm to '
               'identical logits; it replaces an older one.')
    parser.add_argument('files', nargs='+', type=Path, metavar='FILE', help='checkpoint of the release')
    parser.add_argument('--output', type=Path, default='.', metavar='DIR', help='folder of the folders (default: here)')
    parser.add_argument(
        '--model', choices=[r.name for r in RELEASES], metavar='NAME',
        help='model that the FILE must be, such as hbonet_100.in1k')
    parser.add_argument(
        '--allow-unknown-digest', action='store_true',
        help='convert a FILE that is not of the release, as --model; its card claims no accuracy')
    args = parser.parse_args()
    if args.model and len(args.files) > 1:
        parser.error('--model takes a single FILE')
    if args.allow_unknown_digest and not args.model:
        parser.error('--allow-unknown-digest needs --model')

    for path in args.files:
        try:
            release = identify(path, args.model, args.allow_unknown_digest)
            convert(path, release, release.hf_hub_id.partition('@')[0], args.output / release.name)
        except (OSError, RuntimeError, ValueError) as e:
            sys.exit(f'error: {" ".join(str(e).split())}')
        print(args.output / release.name)


if __name__ == '__main__':
    main()
