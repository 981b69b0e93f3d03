"""Register the HBONet models when a program imports timm.

It is a module of its own at the root of site-packages: interpreter start-up runs it (timm_hbonet.pth, or timm_hbonet.start
from Python 3.15 on), and must not pay for the import of the package. `TIMM_HBONET_AUTOLOAD=0` switches it off.
"""
import os
import sys

__all__ = ['install']


def _register() -> None:
    if os.environ.get('TIMM_HBONET_AUTOLOAD') == '0':
        return
    try:
        import timm_hbonet  # noqa: F401
    except Exception as e:  # whatever is wrong here must not stop a program that only wants timm
        import warnings
        warnings.warn(
            f'timm-hbonet could not register its models, timm works without them. {type(e).__name__}: {e}. '
            f'Reinstall timm-hbonet, or set TIMM_HBONET_AUTOLOAD=0 to silence this.',
            RuntimeWarning,
        )


class _TimmFinder:
    """Meta path finder that lets the others find timm, and has the models registered once timm has been imported."""

    def find_spec(self, name, path=None, target=None):
        if name != 'timm':
            return None
        spec = None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1:]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                break
        loader = getattr(spec, 'loader', None)
        if hasattr(loader, 'exec_module'):
            exec_module = loader.exec_module

            def exec_module_and_register(module):
                loader.exec_module = exec_module
                exec_module(module)
                # not earlier: a program may look for timm without importing it
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            loader.exec_module = exec_module_and_register
        return spec


def install() -> None:
    """Have the models registered at the import of timm, at once if that has been imported."""
    if 'timm' in sys.modules:
        _register()
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())
