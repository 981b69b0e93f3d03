"""What the training scripts and the quickstart share: options, errors, folders and files that they write, images."""
import argparse
import io
import os
import signal
import sys
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence, Union

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from timm.utils import get_outdir
from tqdm import tqdm

RANK = int(os.environ.get('RANK', 0))  # of the process, by torchrun
progress = partial(tqdm, leave=False, disable=RANK > 0)


class BadInput(Exception):
    """A file or an option that the user has to change, and how. The message is one line."""


def raise_errors(errors: Sequence[str]) -> None:
    """Name up to 20 files that are wrong, and say how many more there are."""
    if len(errors) > 1 and RANK == 0:
        print(*errors[:20], sep='\n', file=sys.stderr)
    if errors:
        more = f', and {len(errors) - 20} more' if len(errors) > 20 else ''
        raise BadInput(errors[0] if len(errors) == 1 else f'{len(errors)} are wrong: those above{more}.')


@contextmanager
def requirements() -> Iterator[None]:
    """Name a library that is not installed."""
    try:
        yield
    except ModuleNotFoundError as e:
        script = Path(sys.argv[0]).name
        sys.exit(f"{script}: error: {e.name} is not installed. In a clone of timm-hbonet: pip install -e '.[scripts]'")


def number(kind: type, least: float, most: float = sys.maxsize) -> Callable[[str], Union[int, float]]:
    """Type of an option that takes a finite number within limits."""
    def parse(text: str) -> Union[int, float]:
        with suppress(ValueError):
            if least <= (value := kind(text)) <= most:  # nan is not
                return value
        limits = f'of at least {least}' if most == sys.maxsize else f'from {least} to {most}'
        name = 'a whole number' if kind is int else 'a number'
        raise argparse.ArgumentTypeError(f'must be {name} {limits}, got {text!r}')
    return parse


def device(text: str) -> str:
    """Type of an option that takes PyTorch's name of a device of this machine."""
    try:
        found = torch.device(text)
        if found.type == 'cuda' and (found.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(f'this machine has {torch.cuda.device_count()} CUDA devices')
        if found.type != 'cuda':  # memory there would be taken in each of several processes
            torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as e:
        raise argparse.ArgumentTypeError(f'{text!r} cannot be used: {str(e).splitlines()[0]}. Give another') from None
    return text


def add_run_options(parser: argparse.ArgumentParser, output: str, epochs: int) -> None:
    """Options that all scripts have."""
    add = parser.add_argument
    add('--output', type=Path, default=Path('output') / output, metavar='DIR',
        help='new folder for what is written; if it is there, DIR-1, DIR-2, ... (default: %(default)s)')
    add('--device', type=device, default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME',
        help='(default: %(default)s)')
    add('--epochs', type=number(int, 1), default=epochs, metavar='N', help='(default: %(default)s)')
    # torch, NumPy and Python take more, less the epochs and processes that are added
    add('--seed', type=number(int, 0, 2 ** 31), default=0, metavar='N', help='(default: %(default)s)')


def create_model(name: str, **kwargs: Any) -> torch.nn.Module:
    try:
        return timm.create_model(name, **kwargs)
    except Exception as e:  # each source of models and weights has errors of its own
        reason, _, download = str(e).partition('\nDownload ')
        if download:  # after the address it names arguments that a script does not have
            advice = (
                f'Download {download.partition(", and")[0]}, make a folder of it, scripts/publish_to_hub.py --dry-run '
                f'DIR --only NAME.TAG --file FILE, and give --model local-dir:DIR/NAME.TAG.')
        else:
            known = ', '.join(timm.list_models('hbonet*')) or 'none, timm-hbonet is not installed'
            advice = f'timm lists models by timm.list_models(), of this family: {known}.'
        raise BadInput(f'--model {name} cannot be created. {type(e).__name__}: {reason} {advice}') from None


def create_output_dir(args: argparse.Namespace) -> None:
    """Make --output, or with the next free number, a new folder `args.output_dir`: nothing is overwritten."""
    path = args.output if args.output.name not in ('', '..') else args.output.resolve()
    try:
        # also beside an empty one, which another run may have made
        args.output_dir = Path(get_outdir(str(path), inc=True))
    except (OSError, AssertionError) as e:
        reason = e.strerror if isinstance(e, OSError) else 'the numbers up to 99 are taken'
        raise BadInput(f'--output {args.output} cannot be made: {reason}. Give another folder.') from None


def write_file(path: Path, content: bytes) -> None:
    """Write beside the place and rename, so that the file is never half-written."""
    beside = path.with_name(f'.{path.name}')
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as e:
        raise BadInput(f'{path} cannot be written: {e.strerror or e}. Make room, or give another --output.') from None
    finally:
        beside.unlink(missing_ok=True)


def write_figure(path: Path, figure: Any) -> None:
    """Write matplotlib's figure as PNG."""
    figure.savefig(content := io.BytesIO(), format='png')
    write_file(path, content.getvalue())


def read_image(path: Path, mode: str = 'RGB', upright: bool = True) -> Image.Image:
    """Read an image (the first of several) in a mode of Pillow, 'RGB' or 'L', with transparency on white."""
    try:
        with Image.open(path) as file:
            bits_16 = file.mode.startswith('I;16') or (file.mode == 'I' and file.format in ('PNG', 'PPM'))
            if file.mode in ('I', 'F') and not bits_16:
                raise ValueError(f'its {file.mode!r} pixels have 32 bits and no known range, convert it to 8 or 16')
            image = ImageOps.exif_transpose(file) if upright else file.copy()
        if bits_16:  # Pillow would cut off what is above 255
            image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        return image.convert(mode)
    except Exception as e:  # each of Pillow's decoders has errors of its own
        reason = getattr(e, 'strerror', None) or e
        raise BadInput(f'{path} cannot be read as an image: {reason}. Give a JPEG, PNG or WebP file.') from None


interrupts = []


def check_interrupt(*received: Any) -> None:
    """End the program, as the handler of Ctrl-C, and where Python has lost one, as it does in a loader's destructor."""
    interrupts.extend(received[:1])
    if interrupts:
        raise KeyboardInterrupt


def run_script(main: Callable[..., None], parser: argparse.ArgumentParser) -> None:
    """Run a script's main function. What the user can mend, and Ctrl-C, end it with one line."""
    args = parser.parse_args()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not of a background job, which ignores it
        signal.signal(signal.SIGINT, check_interrupt)
    status = 1
    try:
        main(args, parser)
        check_interrupt()
        return
    except BadInput as e:
        # the exception of a loader's process has its traceback before the message
        message = f'error: {str(e).rpartition("BadInput: ")[2].strip()}'
    except OSError as e:
        message = f'error: {e.filename or type(e).__name__}: {e.strerror or e}.'
    except KeyboardInterrupt:
        message, status = 'interrupted.', 130
    # only now, as an exception's frames keep progress bars on the screen
    last = getattr(args, 'output_dir', None) and args.output_dir / 'last.pth'
    if last and last.exists():
        message += f' What was trained is in {last}, continue with --resume {last}'
    print(f'{parser.prog}: {" ".join(message.splitlines())}', file=sys.stderr)
    sys.exit(status)
