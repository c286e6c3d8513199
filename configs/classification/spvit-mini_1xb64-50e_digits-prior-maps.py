# The digits, with the priors of all heads drawn every ten epochs and their focus in
# numbers: vis_data/vis_image/priors_*.png and scalars.json in the run's folder.
_base_ = './spvit-mini_1xb64-50e_digits.py'

custom_hooks = [dict(type='PriorVisualizationHook', interval=10)]
