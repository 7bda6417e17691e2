"""Keeps the panel alive when its page is loaded again while a cell trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from IPython import get_ipython

COMM = ("comm_open", "comm_msg", "comm_close")
"""Messages between widgets and their views."""


@contextmanager
def answering_new_pages() -> Iterator[None]:
    """While the block runs, answer what a page asks first when it is loaded: about the kernel, and for its widgets.

    JupyterLab sends both to the thread that runs cells, which is busy with training. So the thread that receives
    messages (ipykernel 7 and later) answers them; the rest goes its usual way. Under an ipykernel without that thread
    nothing happens: the page waits until the cell has ended.
    """
    kernel: Any = getattr(get_ipython(), "kernel", None)
    thread, stream = getattr(kernel, "shell_channel_thread", None), getattr(kernel, "shell_stream", None)
    if thread is None or stream is None:
        yield
        return
    cell = kernel.get_parent("shell")

    async def receive(message: list[Any]) -> None:
        idents, parts = kernel.session.feed_identities(message, copy=False)
        header = kernel.session.unpack(parts[1].bytes)
        kind, is_for_cells = header.get("msg_type"), header.get("subshell_id") is None
        if not is_for_cells or kind not in ("kernel_info_request", *COMM):
            await kernel.shell_channel_thread_main(message)
            return
        request = kernel.session.deserialize(parts, copy=False)
        kernel._publish_status("busy", "shell", parent=request)
        if kind in COMM:
            getattr(kernel.comm_manager, kind)(stream, idents, request)
        else:
            await kernel.kernel_info_request(stream, idents, request)
        kernel._publish_status("idle", "shell", parent=request)
        kernel._publish_status("busy", "shell", parent=cell)  # as it is: a cell trains

    def listen(with_what: Any) -> None:
        thread.io_loop.add_callback(lambda: stream.on_recv(with_what, copy=False))

    listen(receive)
    try:
        yield
    finally:
        listen(kernel.shell_channel_thread_main)
