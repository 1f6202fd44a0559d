"""The stores of objects, S3, Google's and Azure's: a page of a listing, and the bytes of one version of an object.

Credentials and endpoints are those of fsspec's libraries (AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_CONNECTION_STRING, ...). Of these libraries only single requests are used: their listings are no pages,
and gcsfs asks Google about the bucket before each of its own reads.
"""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from cxrbatch.errors import Fatal, ReasonCode, Retry

__all__ = ["OBJECT_STORES", "Object", "Store", "changed"]


class Object(NamedTuple):
    key: str
    size: int
    changed: datetime
    version: str


class Store(Protocol):
    """What is asked of each store. Its methods run in the thread of fsspec's event loop."""

    async def page(self, bucket: str, prefix: str, most: int, after: str) -> tuple[list[Object], str]:
        """The next objects whose keys begin with `prefix`, and the token for those after them, empty at the end."""
        ...

    async def read(self, bucket: str, key: str, version: str, most: int) -> bytes:
        """At most `most` bytes from the start of an object. Fails where it is another version by now."""
        ...


class _S3:
    def __init__(self) -> None:
        self.files = _file_system("s3")

    async def page(self, bucket: str, prefix: str, most: int, after: str) -> tuple[list[Object], str]:
        more = {"ContinuationToken": after} if after else {}
        page = await self.files._call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=most, **more)
        entries = page.get("Contents", ())
        found = [Object(one["Key"], one["Size"], one["LastModified"], one["ETag"].strip('"')) for one in entries]
        return found, page["NextContinuationToken"] if page.get("IsTruncated") else ""

    async def read(self, bucket: str, key: str, version: str, most: int) -> bytes:
        condition = {"IfMatch": f'"{version}"'} if version else {}
        stream = (await self.files._call_s3("get_object", Bucket=bucket, Key=key, **condition))["Body"]
        try:
            data = bytearray()
            while len(data) < most and (block := await stream.read(min(2**20, most - len(data)))):
                data += block
        finally:
            stream.close()
        return bytes(data)


class _Google:
    def __init__(self) -> None:
        self.files = _file_system("gs")
        self.files.credentials.maybe_refresh()  # gcsfs would try refused credentials for half a minute

    async def page(self, bucket: str, prefix: str, most: int, after: str) -> tuple[list[Object], str]:
        asked = {
            "prefix": prefix or None,
            "maxResults": most,
            "pageToken": after or None,
            "fields": "nextPageToken,items(name,size,timeCreated,generation)",
        }
        page = await self.files._call("GET", "b/{}/o", bucket, json_out=True, **asked)
        found = [
            Object(one["name"], int(one["size"]), datetime.fromisoformat(one["timeCreated"]), str(one["generation"]))
            for one in page.get("items", ())
        ]
        return found, page.get("nextPageToken", "")

    async def read(self, bucket: str, key: str, version: str, most: int) -> bytes:
        asked = {"Range": f"bytes=0-{most - 1}"}
        headers, data = await self.files._call("GET", self.files.url(f"{bucket}/{key}"), headers=asked)
        if headers.get("X-Goog-Generation") != version:
            raise changed()
        return bytes(data)


class _Azure:
    def __init__(self) -> None:
        try:
            self.files = _file_system("az")
        except ValueError:
            names = "AZURE_STORAGE_CONNECTION_STRING or AZURE_STORAGE_ACCOUNT_NAME"
            raise Fatal(f"az:// needs a storage account; check {names}.") from None

    async def page(self, bucket: str, prefix: str, most: int, after: str) -> tuple[list[Object], str]:
        container = self.files.service_client.get_container_client(bucket)
        # One retry: the first of Azure's comes after 15 seconds.
        asked = {"include": ["metadata"], "results_per_page": most, "retry_total": 1}
        pages = container.list_blobs(name_starts_with=prefix or None, **asked).by_page(after or None)
        found = [
            Object(one.name, one.size, one.last_modified, one.etag.strip('"'))
            async for one in await anext(pages)
            if not any(name.lower() == "hdi_isfolder" for name in one.metadata or ())  # a folder with a name of its own
        ]
        return found, pages.continuation_token or ""

    async def read(self, bucket: str, key: str, version: str, most: int) -> bytes:
        from azure.core import MatchConditions

        blob = self.files.service_client.get_blob_client(bucket, key)
        condition = {"etag": f'"{version}"', "match_condition": MatchConditions.IfNotModified}
        return bytes(await (await blob.download_blob(0, most, **condition)).readall())


OBJECT_STORES: dict[str, type[Store]] = {"s3": _S3, "gs": _Google, "az": _Azure}


def _file_system(scheme: str) -> Any:
    import fsspec

    for name in ("gcsfs", "google", "adlfs", "azure"):  # with no handler, their warnings and traces go to stderr
        logging.getLogger(name).addHandler(logging.NullHandler())
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)


def changed() -> Retry:
    return Retry(ReasonCode.CHANGED_WHILE_READ, "The object changed while it was read.")
