# A fresh machine needs Python 3.10 or later (with venv) and make, nothing else: `make demo`, `make test`.
# Where uv is installed, it makes the environment; pip does otherwise.

PYTHON ?= python3
ARGS ?=
# Notebooks, and the files of tests, are run by so many processes at once (at least 1), each with its share of the cores.
NB_WORKERS ?= 2
NB_THREADS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) / $(NB_WORKERS) \| 1)

bin := .venv/bin
installed := .venv/.installed

# albumentations asks the network for updates unless told; plots of the checks need no display.
export NO_ALBUMENTATIONS_UPDATE = 1
check test-nbs test-py test-env test-full: export MPLBACKEND = Agg
# What is imported is for the environments to say; with IN_TEST set, nbdev_export does nothing. What is compiled is kept:
# without that, each process would compile fastai and torch anew, which takes longer than most tests.
unexport PYTHONPATH PYTHONHOME IN_TEST PYTHONDONTWRITEBYTECODE

# $(call timed,name,command): runs the command and says how long it took.
timed = @echo "== $(1)"; start=$$(date +%s); { $(2); }; status=$$?; \
	echo "== $(1): $$(($$(date +%s) - start)) s"; exit $$status

nbdev_test = CIFAR_FASTAI_DATA=digits CIFAR_FASTAI_EPOCHS=1 CIFAR_FASTAI_WIDTH=16 OMP_NUM_THREADS=$(NB_THREADS) \
	$(bin)/nbdev_test --n_workers $(NB_WORKERS) --timing

with_cifar10 := nbs/10_models.ipynb nbs/tutorials/best_recipe.ipynb nbs/tutorials/read_the_result.ipynb

# The page that opens in Colab, with the versions that Colab has; on the digits, one epoch.
in_colab = CIFAR_FASTAI_DATA=digits CIFAR_FASTAI_EPOCHS=1 CIFAR_FASTAI_WIDTH=16 $(PYTHON) tools/environment.py colab --notebook nbs/tutorials/train_cifar10.ipynb

in_parallel = -n $(NB_WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install chromium demo train test check test-nbs test-py test-env test-full export readme clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

by_uv = { test -x $(bin)/python || uv venv -q --python $(PYTHON) .venv; } && uv pip install -q --python $(bin)/python -e '.[dev]'
by_pip = { test -x $(bin)/pip || $(PYTHON) -m venv .venv; } && $(bin)/pip install -q -e '.[dev]'

install: $(installed) ## make .venv with the package, editable, and all it needs

$(installed): settings.ini setup.py pyproject.toml
	$(call timed,install,if uv --version >/dev/null 2>&1; then $(by_uv); else $(by_pip); fi)
	@touch $@

# Some tests look at pages. Without root, or where there is no apt-get, they are skipped.
chromium: ## install Chromium for the tests that look at pages, where apt-get can
	@for name in chromium chromium-browser google-chrome; do ! command -v $$name >/dev/null || exit 0; done; \
	echo "== chromium"; { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 \
	|| echo "Chromium is not here and apt-get could not install it: tests that look at pages are skipped"

demo: $(installed) ## train a narrow network on the handwritten digits that ship with scikit-learn (no download)
	$(bin)/cifar_train --data digits --width 16 $(ARGS)

train: $(installed) ## train on CIFAR-10, found or downloaded; options go in ARGS="--epochs 3 …"
	$(bin)/cifar_train $(ARGS)

test: chromium check test-nbs test-py ## run the checks of one environment; what takes longer is in test-full and test-env

check: $(installed) ## notebooks are clean, the package is their export, README.md is made from the index
	$(call timed,clean and in sync,$(bin)/python tools/check_sync.py)
	$(call timed,README.md,$(bin)/python tools/readme.py --check)

test-nbs: $(installed) ## run all notebooks on the digits, one epoch, a narrow network
	$(call timed,notebooks,$(nbdev_test))

test-py: $(installed) ## run pytest, without what is marked slow
	$(call timed,pytest,OMP_NUM_THREADS=$(NB_THREADS) $(bin)/python -m pytest -m "not slow" $(in_parallel))

test-env: ## the fast tests in an environment of tests/envs: make test-env ENV=oldest (colab, newest, dev)
	$(call timed,environment $(ENV),OMP_NUM_THREADS=$(NB_THREADS) $(PYTHON) tools/environment.py $(ENV) -- $(in_parallel))

test-full: chromium check ## every check: all that is marked slow, the newest versions of all libraries, and Colab's
	$(MAKE) test-env ENV=newest
	$(call timed,the tutorial as in Colab,$(in_colab))
	$(call timed,notebooks,$(nbdev_test) --flags slow)
	$(if $(filter-out digits,$(CIFAR_FASTAI_DATA)),$(call timed,notebooks with cells that need CIFAR-10,true $(foreach nb,$(with_cifar10),&& $(bin)/nbdev_test --path $(nb) --flags cifar10)))
	$(call timed,pytest,OMP_NUM_THREADS=$(NB_THREADS) $(bin)/python -m pytest $(in_parallel))

export: $(installed) ## after an edit of notebooks: write the package and README.md, clean the notebooks
	$(bin)/nbdev_export
	$(bin)/nbdev_clean
	$(bin)/python tools/readme.py

readme: ## write README.md from nbs/index.ipynb, and the repository's links from settings.ini
	$(PYTHON) tools/readme.py

clean: ## remove builds and caches; environments and runs stay
	rm -rf build dist *.egg-info _docs _proc .pytest_cache
	find cifar_fastai nbs tests tools -name __pycache__ -prune -exec rm -rf {} +
