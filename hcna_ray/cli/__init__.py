"""The ``hcna`` command: one module per group, each command parses, calls the client, prints.

    main      the application, errors as one line, exit codes
    terminal  where data and talk go, payloads and options from the command line
    render    values as tables and lines
    cluster   up, down, status, env
    tasks     submit, task, map, why
    workers   workers, intent
    demo, measure   the two tours
    audit     audit

Data goes to stdout, talk to stderr, ``--json`` works everywhere. Speaks to C1 only through
``hcna_ray.client``; only ``up``, ``down`` and ``status`` load the supervisor, and only when run.
"""
