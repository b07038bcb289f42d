"""A host and its vTPM, for tests of the command line."""

from __future__ import annotations

import datetime

from .evidence_maker import Host, Site, Vtpm

NOW = datetime.datetime.now(datetime.UTC)
HOST = Host(Site(made=NOW - datetime.timedelta(days=2)))
WEB = Vtpm(HOST, made=NOW - datetime.timedelta(days=1))
