"""Somebody else's Serve application, beside C1."""

from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0, "resources": {"M1": 0.001}})
class Neighbour:
    def __call__(self, request):
        return "next door"


app = Neighbour.bind()
