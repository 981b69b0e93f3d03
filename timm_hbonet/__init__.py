"""The HBONet family (Li, Zhou, Yao, ICCV 2019) for timm: importing this registers its models."""
from timm import is_model, model_entrypoint

__version__ = '0.1.0'
__all__ = ['HBONet']

if not is_model('hbonet_100'):
    from .hbonet import HBONet
else:
    # a timm that ships the family keeps its own, and so does a reload
    HBONet = model_entrypoint('hbonet_100').__globals__.get('HBONet')  # type: ignore[assignment,misc]
