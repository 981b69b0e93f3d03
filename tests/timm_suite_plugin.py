"""pytest plugin for timm's own tests: they ask of the HBONet models what they ask of others, and of no others.

Those that take a second (scripting, tracing, pruning, building a model again and again) are for one of each kind.
"""
import re

import timm

# contraction by 2, for images of 192 x 192; by 4; and by 8
REPRESENTATIVES = {'hbonet_060', 'hbonet_025_4x_d8', 'hbonet_025_8x_d8'}
_SLOW = re.compile('torchscript|_fx|prune|pretrained|default_cfgs')


def pytest_configure():
    list_models = timm.list_models

    def list_hbonet_models(filter='', module='', **kwargs):
        if isinstance(module, list) and 'efficientnet' in module:  # the modules with forward_intermediates()
            module = [*module, 'hbonet']
        return [name for name in list_models(filter=filter, module=module, **kwargs) if name.startswith('hbonet')]

    timm.list_models = list_hbonet_models


def pytest_collection_modifyitems(items):
    selected = []
    for item in items:
        model = re.search(r'hbonet_\w+', item.name)
        if model and (model[0] in REPRESENTATIVES or not _SLOW.search(item.name)):
            selected.append(item)
    items[:] = selected
