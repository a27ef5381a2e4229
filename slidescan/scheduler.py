"""A Dask scheduler that somebody started: its address, and the certificates that it and we must have."""

from __future__ import annotations

import ipaddress
import warnings
from typing import TYPE_CHECKING

from slidescan.errors import ConfigError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["connect"]

# Seconds to wait for a scheduler to answer before saying that it does not.
_SCHEDULER_TIMEOUT_S = 5
_ENCRYPTED = ("tls", "wss")
_CERTIFICATES = (
    "set DASK_DISTRIBUTED__COMM__TLS__CA_FILE, DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT and "
    "DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY to the files that the scheduler was started with"
)


def connect(address: str) -> Client:
    """Connect to a running Dask scheduler, with the certificates that Dask's own configuration names.

    Warns where the address is of another machine and not encrypted.

    Raises
    ------
    ConfigError
        If none answers at `address`, or its certificates and ours do not fit.
    """
    from distributed import Client
    from distributed.comm.core import FatalCommClosedError
    from distributed.security import Security

    try:
        security = Security()
        ours = security.get_connection_args("client")["ssl_context"] is not None
    except (OSError, ValueError) as exc:
        raise ConfigError(f"--scheduler: the client's certificates cannot be read ({exc}); {_CERTIFICATES}") from exc
    if _scheme(address) in _ENCRYPTED and not ours:
        raise ConfigError(f"--scheduler: {address} takes only clients with certificates; {_CERTIFICATES}")
    if _is_exposed(address):
        warnings.warn(
            f"--scheduler: what is sent to {address} is code to run, and anyone on the way can change it; "
            "beyond this machine use tls://",
            stacklevel=2,
        )
    try:
        return Client(address, timeout=_SCHEDULER_TIMEOUT_S, security=security)
    except FatalCommClosedError as exc:
        raise ConfigError(
            f"--scheduler: {address} and this client have certificates of different authorities; {_CERTIFICATES}"
        ) from exc
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"--scheduler: no Dask scheduler answers at {address} within {_SCHEDULER_TIMEOUT_S} s; "
            "start one with `dask scheduler`, write tls:// if it has certificates, or leave the option out"
        ) from exc
    except RuntimeError as exc:  # Dask is told to require encryption
        raise ConfigError(f"--scheduler: {exc}; use tls://") from exc


def _scheme(address: str) -> str:
    return address.partition("://")[0] if "://" in address else "tcp"


def _is_exposed(address: str) -> bool:
    """Return whether others may listen to what is sent to `address`."""
    from distributed.comm import get_address_host

    if _scheme(address) in (*_ENCRYPTED, "inproc"):
        return False
    host: str = address
    try:
        host = get_address_host(address)
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or an address that Dask refuses
        return host != "localhost"
