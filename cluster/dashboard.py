"""The REST interface of a Ray cluster's dashboard: the one door to a cluster, near or far.

HTTP instead of Ray's own client, so that the API and the scheduler need no Ray connection (and no matching
Python) to talk to the cluster that trains.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import httpx

from peft_service.errors import PeftServiceError


class ClusterUnavailable(PeftServiceError):
    """The cluster does not answer now. Says nothing about the jobs on it; worth a retry."""

    status: ClassVar[int] = 503
    default_code: ClassVar[str] = "cluster_unavailable"


class Dashboard:
    """One cluster's dashboard; safe to share between threads."""

    def __init__(
        self, address: str, token: Callable[[], str | None] = lambda: None, seconds: float = 10
    ) -> None:
        """
        Args:
            address: `http://host:8265`, or the GCS as `host:6379`, which is asked for the dashboard.
            token: read at each request, so that a rotated token file is noticed.
            seconds: how long one request may take.
        """
        self.address = address
        self._url = address.rstrip("/") if "://" in address else None
        self._token = token
        # Proxy variables are meant for the outer world, the dashboard is on our own network.
        self._http = httpx.Client(timeout=seconds, trust_env=False)

    @property
    def url(self) -> str:
        if self._url is None:
            self._url = _dashboard_of(self.address)
        return self._url

    def request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """The response, whatever its status but those that mean "not now".

        Raises:
            ClusterUnavailable: no answer, a gateway's excuse, or our token was refused.
        """
        token = self._token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = self.url
        try:
            response = self._http.request(method, url + path, json=body, headers=headers)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise ClusterUnavailable(
                f"the Ray cluster at {url} does not answer ({type(error).__name__}: {error}); "
                "is it running, and is the address right?"
            ) from error
        if response.status_code in (401, 403):
            seen = "our token was refused" if token else "it wants a token and we have none"
            raise ClusterUnavailable(
                f"the Ray cluster at {url} answers {response.status_code}: {seen}; "
                "set RAY_AUTH_TOKEN_PATH to the file with its token",
                code="cluster_denied",
            )
        if response.status_code in (429, 502, 503, 504):
            raise ClusterUnavailable(f"the Ray cluster at {url} answers {response.status_code}; retrying")
        return response

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """The decoded body of a response that must be 2xx.

        Raises:
            ClusterUnavailable: it is not; with what the cluster said.
        """
        response = self.request(method, path, body)
        if response.is_success and not response.content:
            return None
        if response.is_success:
            return response.json()
        raise ClusterUnavailable(
            f"{method} {self.url}{path} answered {response.status_code}: {_last(response.text)}"
        )


def _dashboard_of(gcs: str) -> str:
    from ray.dashboard.utils import ray_address_to_api_server_url

    try:
        return str(ray_address_to_api_server_url(gcs))
    except Exception as error:
        # Ray raises whatever its C++ side gives it here.
        raise ClusterUnavailable(
            f"the Ray cluster at {gcs} does not answer ({type(error).__name__}: {error})"
        ) from error


def _last(text: str) -> str:
    """The telling line of a traceback, which is what the dashboard answers instead of a message."""
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 1]
    return lines[-1][:500] if lines else "nothing"
