"""Register the HBONet models when a program imports timm.

A module of its own at the root of site-packages, as interpreter start-up runs it (timm_hbonet.pth, or timm_hbonet.start
from Python 3.15 on) and must not pay for the import of the package. `TIMM_HBONET_AUTOLOAD=0` switches it off.
"""
import os
import sys


def _register() -> None:
    if os.environ.get('TIMM_HBONET_AUTOLOAD') == '0':
        return
    try:
        import timm_hbonet
        if not sys.modules['timm'].is_model('hbonet_100'):
            # the package is that of a timm that was imported before this one, or another thread imports it and waits
            # for this timm
            for name in [name for name in sys.modules if name.startswith('timm_hbonet.')]:
                del sys.modules[name]
            import timm_hbonet.hbonet
            timm_hbonet.HBONet = timm_hbonet.hbonet.HBONet
    except Exception as e:  # whatever is wrong here must not stop a program that only wants timm
        import logging
        # not the warnings module: a program that turns warnings into errors would be stopped after all
        logging.getLogger('timm_hbonet').warning(
            f'timm-hbonet could not register its models, timm works without them. {type(e).__name__}: {e} '
            f'(`import timm_hbonet` shows where it fails; reinstall timm-hbonet, or set TIMM_HBONET_AUTOLOAD=0)'
        )


class _TimmLoader:
    """The loader that was found for timm, with registration after it."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def exec_module(self, module):
        # the program finds timm as if it had been imported without this
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()


class _TimmFinder:
    """Meta path finder that lets the others find timm, and wraps the loader that they return.

    It stays on the meta path: programs look for timm without importing it, try again after a failure, import it anew.
    And if it were removed, an import under way in another thread could skip the finder after it.
    """

    _asks_others = False  # one for all threads, of which Python lets one at a time ask finders

    def find_spec(self, name, path=None, target=None):
        if name != 'timm' or name in sys.modules or self._asks_others:
            return None

        from importlib.util import find_spec
        self._asks_others = True
        try:
            spec = find_spec(name)
        finally:
            self._asks_others = False

        if hasattr(getattr(spec, 'loader', None), 'exec_module'):
            spec.loader = _TimmLoader(spec.loader)
        return spec


def install() -> None:
    """Have the models registered at every import of timm, at once if that has been imported."""
    if not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())
    if sys.modules.get('timm'):
        _register()
