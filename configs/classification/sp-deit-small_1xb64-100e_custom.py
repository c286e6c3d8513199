# Your own images: data/custom/train/<class>/*.jpg and data/custom/val/<class>/*.jpg
_base_ = [
    '../_base_/models/sp-deit-small.py',
    '../_base_/datasets/custom_bs64_224.py',
    '../_base_/schedules/custom_bs64_100e.py',
    '../_base_/default_runtime.py',
]

model = dict(head=dict(num_classes=2))  # the number of your folders
data_preprocessor = dict(num_classes=2)

# The priors of all heads as pictures, in vis_data/vis_image of the run's folder.
custom_hooks = [dict(type='PriorVisualizationHook', interval=10)]
