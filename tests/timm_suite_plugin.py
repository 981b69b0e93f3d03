"""pytest plugin for timm's own tests: they ask of the HBONet models what they ask of others, and of no others."""
import re

import timm

# contraction by 2, for images of 192 x 192; by 4; and by 8
KINDS = {'hbonet_060', 'hbonet_025_4x_d8', 'hbonet_025_8x_d8'}
TRACED = {'hbonet_025_8x_d8'}
# tests that take seconds: building a model again and again; scripting and tracing
SLOW = {'pretrained|default_cfgs': KINDS, 'torchscript|_fx|prune': TRACED}


def pytest_configure():
    list_models = timm.list_models

    def list_hbonet_models(filter='', module='', **kwargs):
        if isinstance(module, list) and 'efficientnet' in module:  # the modules with forward_intermediates()
            module = [*module, 'hbonet']
        return [name for name in list_models(filter=filter, module=module, **kwargs) if name.startswith('hbonet')]

    timm.list_models = list_hbonet_models


def pytest_collection_modifyitems(items):
    models = {item: re.search(r'hbonet_\w+', item.name) for item in items}
    items[:] = [
        item for item, model in models.items()
        if model and all(model[0] in names for tests, names in SLOW.items() if re.search(tests, item.name))]
