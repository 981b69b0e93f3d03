"""The HBONet family (Li, Zhou, Yao, ICCV 2019) for timm: importing this registers its models."""
from timm.models import is_model

__version__ = '0.1.0'
__all__ = ['HBONet']

# a timm that ships the family keeps its own
if is_model('hbonet_100'):
    from timm.models import HBONet
else:
    from .hbonet import HBONet
