"""What this costs in time, beside its peers and the floors: ``make bench``.

One machine, one run, one load generator (`benchmarks.load`, a process of its own), the same echo
for everybody. Every system is started anew in each round, through what its users type, warmed up,
measured, and ended by pid; rounds go round, so that a machine whose speed drifts drifts for all.

* `benchmarks.systems`: hcna-ray and its peers, each as its own documentation recommends it.
* `benchmarks.floors`: what the parts we stand on allow.
* `benchmarks.parts`: what is measured of them, resumable.
* `benchmarks.report`: the tables and the plot of ``docs/PERFORMANCE.md``.

``benchmarks/peers`` holds programs of the peers' environment; nothing here imports them.
"""
