"""Every public name of the package, for notebooks: `from cifar_fastai.all import *` behind `from fastai.vision.all import *`"""

from .core import *
from .augment import *
from .data import *
from .models import *
from .schedule import *
from .folder import *
from .learner import *
from .interpret import *
from .training import *
from .bench import *
from .repeat import *
from .report import *
from .app import *
from .export import *
from .distributed import *
