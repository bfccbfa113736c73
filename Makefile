# The only prerequisites are make and Python 3.10 or later with venv. Start with `make demo` or `make test`.
# The environment is created with uv if it is installed, and with pip otherwise.

PYTHON ?= python3
ARGS ?=
# Number of processes that run notebooks or test files in parallel (at least 1), and number of threads of each.
NB_WORKERS ?= 2
NB_THREADS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) / $(NB_WORKERS) \| 1)

bin := .venv/bin
installed := .venv/.installed

# Prevent albumentations from checking for updates online. Plots in the checks need no display.
export NO_ALBUMENTATIONS_UPDATE = 1
check test-nbs test-py test-env test-full: export MPLBACKEND = Agg
# Imports must come from the environment alone, and nbdev_export does nothing if IN_TEST is set. Bytecode is kept because
# compiling fastai and torch in each process takes longer than most tests.
unexport PYTHONPATH PYTHONHOME IN_TEST PYTHONDONTWRITEBYTECODE

# $(call timed,name,command): run the command and print how long it took.
timed = @echo "== $(1)"; start=$$(date +%s); { $(2); }; status=$$?; \
	echo "== $(1): $$(($$(date +%s) - start)) s"; exit $$status

nbdev_test = CIFAR_FASTAI_DATA=digits CIFAR_FASTAI_EPOCHS=1 CIFAR_FASTAI_WIDTH=16 OMP_NUM_THREADS=$(NB_THREADS) \
	$(bin)/nbdev_test --n_workers $(NB_WORKERS) --timing

with_cifar10 := nbs/10_models.ipynb nbs/tutorials/best_recipe.ipynb nbs/tutorials/read_the_result.ipynb

# Run the tutorial for one epoch on the digits with the library versions of Colab.
in_colab = CIFAR_FASTAI_DATA=digits CIFAR_FASTAI_EPOCHS=1 CIFAR_FASTAI_WIDTH=16 $(PYTHON) tools/environment.py colab --notebook nbs/tutorials/train_cifar10.ipynb

in_parallel = -n $(NB_WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install chromium demo train test check test-nbs test-py test-env test-full export readme clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

by_uv = { test -x $(bin)/python || uv venv -q --python $(PYTHON) .venv; } && uv pip install -q --python $(bin)/python -e '.[dev]'
by_pip = { test -x $(bin)/pip || $(PYTHON) -m venv .venv; } && $(bin)/pip install -q -e '.[dev]'

install: $(installed) ## create .venv with the package (editable) and the development tools

$(installed): settings.ini setup.py pyproject.toml
	$(call timed,install,if uv --version >/dev/null 2>&1; then $(by_uv); else $(by_pip); fi)
	@touch $@

# Tests of HTML pages use Chromium. They are skipped if it cannot be installed (no root or no apt-get).
chromium: ## install Chromium for the tests of HTML pages, if apt-get is available
	@for name in chromium chromium-browser google-chrome; do ! command -v $$name >/dev/null || exit 0; done; \
	echo "== chromium"; { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 \
	|| echo "Chromium is missing and could not be installed with apt-get: tests of HTML pages are skipped"

# LRMAX is given because a range test on so few images finds 0.02 to 0.2, depending on the seed.
demo: $(installed) ## train a narrow network on scikit-learn's handwritten digits (no download)
	$(bin)/cifar_train --data digits --width 16 --lr_max 0.02 $(ARGS)

train: $(installed) ## train on CIFAR-10, downloaded if not found; pass options in ARGS="--epochs 3 …"
	$(bin)/cifar_train $(ARGS)

test: chromium check test-nbs test-py ## run the checks in .venv, without slow tests (see test-full and test-env)

check: $(installed) ## check that notebooks are clean and that the package and README.md are in sync with them
	$(call timed,clean and in sync,$(bin)/python tools/check_sync.py)
	$(call timed,README.md,$(bin)/python tools/readme.py --check)

test-nbs: $(installed) ## run all notebooks on the digits for one epoch with a narrow network
	$(call timed,notebooks,$(nbdev_test))

test-py: $(installed) ## run pytest without slow tests
	$(call timed,pytest,OMP_NUM_THREADS=$(NB_THREADS) $(bin)/python -m pytest -m "not slow" $(in_parallel))

test-env: ## run the fast tests in an environment of tests/envs: make test-env ENV=oldest (colab, newest, dev)
	$(call timed,environment $(ENV),OMP_NUM_THREADS=$(NB_THREADS) $(PYTHON) tools/environment.py $(ENV) -- $(in_parallel))

test-full: chromium check ## run all checks, including slow tests, the newest library versions and those of Colab
	$(MAKE) test-env ENV=newest
	$(call timed,the tutorial as in Colab,$(in_colab))
	$(call timed,notebooks,$(nbdev_test) --flags slow)
	$(if $(filter-out digits,$(CIFAR_FASTAI_DATA)),$(call timed,notebooks with cells that need CIFAR-10,true $(foreach nb,$(with_cifar10),&& $(bin)/nbdev_test --path $(nb) --flags cifar10)))
	$(if $(CIFAR_FASTAI_HUMAN),$(call timed,the page with people's answers,$(bin)/nbdev_test --path nbs/tutorials/people.ipynb --flags people))
	$(call timed,pytest,OMP_NUM_THREADS=$(NB_THREADS) $(bin)/python -m pytest $(in_parallel))

export: $(installed) ## after editing notebooks: export the package, clean the notebooks, generate README.md
	$(bin)/nbdev_export
	$(bin)/nbdev_clean
	$(bin)/python tools/readme.py

readme: ## generate README.md from nbs/index.ipynb, and update tables and repository links
	$(PYTHON) tools/readme.py

clean: ## remove builds and caches; keep environments and runs
	rm -rf build dist *.egg-info _docs _proc .pytest_cache
	find cifar_fastai nbs tests tools -name __pycache__ -prune -exec rm -rf {} +
