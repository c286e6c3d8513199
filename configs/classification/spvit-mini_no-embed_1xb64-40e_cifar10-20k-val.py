# Trains as the config beside it, but is evaluated on 2,500 other training images:
# for choosing a recipe, which the test images must not take part in.
_base_ = './spvit-mini_no-embed_1xb64-40e_cifar10-20k.py'

held_out = dict(data_prefix='train', indices=range(2, 50000, 20))
val_dataloader = dict(dataset=held_out)
test_dataloader = dict(dataset=held_out)
