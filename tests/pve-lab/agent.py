"""The guest agent's calls of the API, answered by the real agent in the guest, in the form in which Proxmox VE answers them.

The shapes are those of the API's own description (`agent/file-read` and so on); limits that it states are checked before.
"""

import base64

# A file is read in pieces of this size, up to what the API's description allows.
PIECE, LONGEST_READ = 1 << 20, 16 << 20


async def file_read(machine, values):
    left = int(values.get('count') or LONGEST_READ)
    handle = await machine.ask_agent('guest-file-open', {'path': values['file'], 'mode': 'r'})
    content, whole = b'', False
    try:
        if values.get('offset'):
            await machine.ask_agent('guest-file-seek', {'handle': handle, 'offset': int(values['offset']), 'whence': 'set'})
        while left and not whole:
            piece = await machine.ask_agent('guest-file-read', {'handle': handle, 'count': min(left, PIECE)})
            content += base64.b64decode(piece['buf-b64'])
            left, whole = left - piece['count'], piece['eof']
    finally:
        await machine.ask_agent('guest-file-close', {'handle': handle})
    # Perl takes bytes for characters, so a text beyond ASCII arrives as Latin-1.
    text = content.decode('latin-1') if truth(values.get('decode', 1)) else base64.b64encode(content).decode()
    return {'content': text, 'bytes-read': len(content)} | ({} if whole else {'truncated': 1})


async def file_write(machine, values):
    content = values['content']
    if truth(values.get('encode', 1)):
        content = base64.b64encode(content.encode('latin-1')).decode()
    handle = await machine.ask_agent('guest-file-open', {'path': values['file'], 'mode': 'wb'})
    try:
        await machine.ask_agent('guest-file-write', {'handle': handle, 'buf-b64': content})
    finally:
        await machine.ask_agent('guest-file-close', {'handle': handle})


async def run(machine, values):
    command = values['command'] if isinstance(values['command'], list) else [values['command']]
    order = {'path': command[0], 'arg': command[1:], 'capture-output': True}
    if values.get('input-data') is not None:
        order['input-data'] = base64.b64encode(values['input-data'].encode()).decode()
    return await machine.ask_agent('guest-exec', order)


async def run_status(machine, values):
    status = await machine.ask_agent('guest-exec-status', {'pid': int(values['pid'])})
    for name in ('out-data', 'err-data'):
        if name in status:
            status[name] = base64.b64decode(status[name]).decode('latin-1')
    return {name: int(value) if isinstance(value, bool) else value for name, value in status.items()}


SPECIAL = {'file-read': file_read, 'file-write': file_write, 'exec': run, 'exec-status': run_status}


async def call(machine, command, values):
    """The `data` of the answer. Most commands are the agent's own, and what it says is the `result`."""
    if command in SPECIAL:
        return await SPECIAL[command](machine, values)
    return {'result': await machine.ask_agent(f'guest-{command}')}


def truth(value):
    return str(value) in ('1', 'true')
