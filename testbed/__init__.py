"""Real servers, a network that fails and a provider that misbehaves, for tests and measurements.

- `processes`: waiting, free ports, child processes, and the base class of the servers
- `forks`: workers that start in a fraction of the time, from a process that has imported their libraries
- `network`: a gateway that fails as a network does, certificates, TLS in front of a server
- `servers`: MongoDB, a replica set, Redis, Sentinel and RabbitMQ
- `provider`: an OpenAI-compatible server in a thread
- `answers`: what the provider answers, and the directives by which a prompt asks for faults
- `api`: what the API does with jobs, and the worker as a process

`python -m testbed` starts MongoDB, Redis and the provider, prints the environment variables that a worker needs to
use them, and waits.
"""
