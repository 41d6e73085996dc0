"""What Flower runs as ClientApp; a file of its own, since it imports torch and diffusers."""

from fedphd.deploy.apps.stock import client_app

__all__ = ["client_app"]
