# The same ViT without priors, class token first: the baseline.
_base_ = './spvit-mini_1xb64-50e_digits.py'

model = dict(backbone=dict(num_spsa_layers=0))
