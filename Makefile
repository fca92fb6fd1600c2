PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := $(VENV)/lowest
ARGS ?=

# many processes import the same packages, and without compiled files each takes seconds for it
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv test test-fast test-lowest check demo bench soak clean

help:  ## say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24
	@echo '  PYTHON=python3.12 chooses the Python of a new .venv, ARGS="-k name" goes to pytest'

# $(call apt_install,PACKAGE) is true if Debian's package could be installed; it never asks for a password
define apt_install
if command -v apt-get >/dev/null && { [ "$$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then \
	sudo=""; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq update \
	&& $$sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $(1) </dev/null; \
else false; fi
endef

$(BIN)/pip-ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo 'djdist needs Python 3.10 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(call apt_install,python3-venv); } \
		|| { echo 'This Python cannot make virtual environments: apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(BIN)/all-ready: pyproject.toml | $(BIN)/pip-ready
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group dev
	@touch $@ $(BIN)/demo-ready

$(BIN)/demo-ready: pyproject.toml | $(BIN)/pip-ready
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

venv: $(BIN)/all-ready  ## .venv with djdist, all its extras and the tools

.PHONY: mysql-server
mysql-server:
	@PATH="$$PATH:/usr/sbin:/usr/local/sbin"; \
	[ -n "$$DJDIST_TEST_MYSQL_URL" ] || command -v mariadbd >/dev/null || command -v mysqld >/dev/null \
		|| { $(call apt_install,mariadb-server); } \
		|| echo 'No MariaDB or MySQL server here, and none could be installed: its tests are skipped.' >&2

.PHONY: browser
browser:  # it opens the pages of djdist.report()
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null \
		|| { $(call apt_install,chromium chromium-driver); } \
		|| echo 'No Chromium with its driver here, and none could be installed: its tests are skipped.' >&2

.PHONY: ssh-server
ssh-server:  # hosts of the tests are reached by it, as by ray up
	@PATH="$$PATH:/usr/sbin:/sbin"; \
	{ command -v sshd && command -v ssh && command -v rsync && command -v ip; } >/dev/null \
		|| { $(call apt_install,openssh-server openssh-client rsync iproute2); } \
		|| echo 'No SSH server here, and none could be installed: tests of hosts with SSH are skipped.' >&2

.PHONY: slurm
slurm:  # jobs of the tests run on it
	@PATH="$$PATH:/usr/sbin:/sbin"; \
	{ command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; } >/dev/null \
		|| { $(call apt_install,slurmctld slurmd slurm-client munge); } \
		|| echo 'No Slurm here, and none could be installed: its tests are skipped.' >&2

.PHONY: real-mysql
real-mysql:  # Debian has MySQL itself in its unstable suite only
	@[ -n "$$DJDIST_TEST_REAL_MYSQL_URL" ] || [ -e $(VENV)/mysql/usr/sbin/mysqld ] || { \
		[ "$$(id -u)" = 0 ] && rm -rf $(VENV)/mysql.part \
		&& { command -v debootstrap >/dev/null || { $(call apt_install,debootstrap); }; } \
		&& timeout 300 debootstrap --variant=minbase --include=mysql-server-core sid $(VENV)/mysql.part >/dev/null \
		&& mv $(VENV)/mysql.part $(VENV)/mysql; \
	} || echo 'No real MySQL server can be had here: its tests are skipped.' >&2

.PHONY: new-mariadb
new-mariadb:  # 11.6.2 and newer isolate snapshots, and Debian 12 has an older one
	@[ -n "$$DJDIST_TEST_NEW_MARIADB_URL" ] || [ -e $(VENV)/mariadb-11.8/usr/sbin/mariadbd ] || { \
		[ "$$(id -u)" = 0 ] && rm -rf $(VENV)/mariadb-11.8.part \
		&& { command -v debootstrap >/dev/null || { $(call apt_install,debootstrap); }; } \
		&& timeout 600 debootstrap --variant=minbase --include=mariadb-server trixie $(VENV)/mariadb-11.8.part >/dev/null \
		&& mv $(VENV)/mariadb-11.8.part $(VENV)/mariadb-11.8; \
	} || echo 'No MariaDB 11.8 can be had here: its tests are skipped.' >&2

test: $(BIN)/all-ready mysql-server real-mysql new-mariadb browser $(if $(findstring --thorough,$(ARGS)),ssh-server slurm)  ## all tests but the long ones, on servers of their own
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)
	$(if $(filter --thorough,$(ARGS)),$(if $(filter-out --thorough,$(ARGS)),,$(MAKE) test-lowest ARGS=))

test-fast: $(BIN)/all-ready  ## units and contracts in under a minute, without databases and clusters
	$(BIN)/python -m pytest -n 2 --dist worksteal --fast tests/unit tests/contract $(ARGS)

$(LOWEST)/ready: pyproject.toml | $(BIN)/pip-ready
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct --editable '.[all]' --group test
	@touch $@

test-lowest: $(LOWEST)/ready mysql-server  ## units and each executor with the lowest versions that pyproject.toml admits
	$(LOWEST)/bin/python -m pytest tests/unit tests/acceptance/test_results.py $(ARGS)

check: $(BIN)/all-ready  ## lint, formatting, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: $(BIN)/demo-ready  ## a real pipeline over real images on this machine
	$(BIN)/python -m djdist.demo $(ARGS)

.PHONY: notebooks
notebooks: $(BIN)/all-ready  ## the notebooks with new outputs, in place
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=tests $(BIN)/python -m lab.notebooks $(ARGS)

.PHONY: docs
docs: $(BIN)/all-ready  ## the documentation as a site, in build/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo 'open build/docs/index.html'

bench: $(BIN)/all-ready mysql-server  ## djdist beside native populate and bare SQL, for an hour and a half
	$(BIN)/python -m pytest tests/benchmarks $(ARGS)

soak: $(BIN)/all-ready mysql-server  ## 20,000 jobs and a random fault every few seconds for ten minutes
	$(BIN)/python tests/soak.py $(ARGS)

.PHONY: dist
dist: $(BIN)/pip-ready  ## wheel and sdist in dist/, checked, and tried in fresh environments
	rm -rf dist
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	for file in dist/*; do PYTHON=$(PYTHON) .ci/try-dist $$file || exit 1; done

clean:  ## remove .venv and all caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.git/*' -type d -prune -exec rm -rf {} +
