"""Where pretrained weights come from."""
from timm.models import build_model_with_cfg

__all__ = ['build_model_with_cfg']
