#!/usr/bin/python3
"""Logs in through PAM as xrdp does, in the desktop. The password is the first line of standard input.

    pam_login.py SERVICE USER     prints which step was refused and exits with 1, or "open"; logs out at the end of input
"""

import ctypes
import os
import sys

PAM_TTY, PAM_ESTABLISH_CRED = 3, 2
libc, pam = ctypes.CDLL(None), ctypes.CDLL("libpam.so.0")
libc.strdup.restype = libc.calloc.restype = ctypes.c_void_p
pam.pam_strerror.restype = pam.pam_getenv.restype = ctypes.c_char_p


class Message(ctypes.Structure):
    _fields_ = [("style", ctypes.c_int), ("text", ctypes.c_char_p)]


class Response(ctypes.Structure):
    _fields_ = [("text", ctypes.c_void_p), ("code", ctypes.c_int)]


Converse = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.POINTER(Message)), ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)


class Conversation(ctypes.Structure):
    _fields_ = [("function", Converse), ("data", ctypes.c_void_p)]


def main(service, user):
    password = sys.stdin.readline().rstrip("\n").encode()

    @Converse
    def answer(count, messages, responses, _):
        responses[0] = libc.calloc(count, ctypes.sizeof(Response))
        made = ctypes.cast(responses[0], ctypes.POINTER(Response))
        for i in range(count):
            if messages[i].contents.style in (1, 2):
                made[i].text = libc.strdup(password)
        return 0

    conversation, handle = Conversation(answer, None), ctypes.c_void_p()
    pam.pam_start(service.encode(), user.encode(), ctypes.byref(conversation), ctypes.byref(handle))
    pam.pam_set_item(handle, PAM_TTY, b":10")
    for step, flags in (
        ("authenticate", 0),
        ("acct_mgmt", 0),
        ("setcred", PAM_ESTABLISH_CRED),
        ("open_session", 0),
    ):
        code = getattr(pam, f"pam_{step}")(handle, flags)
        if code:
            print(f"{step}: {pam.pam_strerror(handle, code).decode()}", flush=True)
            pam.pam_end(handle, code)
            return 1
    print("open", (pam.pam_getenv(handle, b"XDG_RUNTIME_DIR") or b"-").decode(), flush=True)
    while os.read(0, 100):
        pass
    pam.pam_close_session(handle, 0)
    pam.pam_end(handle, 0)
    print("closed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
