"""The names for notebooks: `from cifar_fastai.all import *`, after `from fastai.vision.all import *`. Others are imported from their modules."""
from .core import Recipe, TrainSettings, cifar10_classes, cifar10_stats, recipes
from .data.images import CIFAR10Data, load_digits
from .data.picture import read_image
from .data.archive import read_images
from .data.source import load_cifar10
from .data.augment import CropFlipCutout, plot_augmented
from .data.block import cifar_block, cifar_dls
from .models import CustomResNet, load_pretrained, model_summary, plot_model
from .optimizer import FusedAdam
from .callback.schedule import (LRBounds, OneCycle, bounds_from, find_edge, lr_bounds, one_cycle_lr, plot_range_test,
                                range_test)
from .callback.precision import keep_memory
from .callback.checkpoint import Checkpoints, checkpoints_in, newest_checkpoint
from .learner import cifar_learner
from .run.folder import read_csv_exact, read_history, read_range_test
from .look.plots import plot_classes, plot_history, plot_images, plot_lrs
from .look.interpret import CifarInterpretation
from .run.train import SaveRun, finish_run, resume, run_config, train
from .run.repeat import collect_runs, plot_band
from .run.distributed import launched_processes # its module adds `distrib_ctx` to the learner
from .look.report import write_report
from .look.compare import mcnemar, write_comparison
from .use.predict import load_classifier
from .use.export import export_model, load_onnx
from .bench import bench, ratio
