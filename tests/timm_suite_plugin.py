"""pytest plugin for timm's own tests: has those that list models by module include the module of HBONet."""
import timm

_list_models = timm.list_models


def _list_models_and_hbonet(filter='', module='', **kwargs):
    if isinstance(module, list) and 'efficientnet' in module:  # the modules with forward_intermediates()
        module = [*module, 'hbonet']
    return _list_models(filter=filter, module=module, **kwargs)


timm.list_models = _list_models_and_hbonet
