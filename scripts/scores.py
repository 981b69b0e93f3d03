"""What the authors published about the released checkpoints, and multiply-adds that are computed."""
from typing import Dict, NamedTuple


class Score(NamedTuple):
    """Figures of a released checkpoint."""
    top1: float  # published top-1 accuracy on ImageNet-1k validation in percent, of a single centre crop
    top5: float  # published top-5 accuracy in percent
    published_mflops: int  # published multiply-adds in millions
    macs: int  # multiply-adds of convolutions and classifier, computed from the architecture
    tables: str  # of the paper


# from the README of https://github.com/d-li14/HBONet, and tables 2 to 6 of arXiv:1908.03888
SCORES: Dict[str, Score] = {
    'hbonet_100.in1k': Score(73.1, 91.0, 305, 305572480, '2'),
    'hbonet_080.in1k': Score(71.3, 89.7, 205, 204588576, '2, 3'),
    'hbonet_050.in1k': Score(67.0, 86.9, 96, 96390304, '2'),
    'hbonet_035.in1k': Score(62.4, 83.7, 61, 60861776, '2, 4'),
    'hbonet_025.in1k': Score(57.3, 79.8, 37, 36511912, '2'),
    'hbonet_010.in1k': Score(41.5, 65.7, 14, 13674384, '2'),
    'hbonet_080.r192_in1k': Score(70.0, 89.2, 150, 150734464, '3'),
    'hbonet_080.r160_in1k': Score(68.3, 87.8, 105, 105165600, '3'),
    'hbonet_080.r128_in1k': Score(65.5, 85.9, 68, 67881984, '3'),
    'hbonet_080.r96_in1k': Score(61.4, 83.0, 39, 38883616, '3'),
    'hbonet_035.r192_in1k': Score(60.9, 82.6, 45, 45139264, '4'),
    'hbonet_035.r160_in1k': Score(58.6, 80.7, 31, 31835600, '4'),
    'hbonet_035.r128_in1k': Score(55.2, 78.0, 21, 20950784, '4'),
    'hbonet_035.r96_in1k': Score(50.3, 73.8, 12, 12484816, '4'),
    'hbonet_050_d8.in1k': Score(67.7, 87.4, 98, 108166768, '5'),
    'hbonet_060.r192_in1k': Score(67.3, 87.3, 108, 97673920, '5'),
    'hbonet_025_d8.in1k': Score(58.3, 80.6, 44, 44097504, '6'),
    'hbonet_025_4x_d8.in1k': Score(59.3, 81.4, 45, 45350336, '6'),
    'hbonet_025_8x_d8.in1k': Score(58.2, 80.4, 45, 45328384, '6'),
}
