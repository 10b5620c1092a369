// What a person does: buttons, keys, focus, and what a screen reader hears.
import { fireEvent } from '@testing-library/svelte';
import { describe, expect, test, vi } from 'vitest';
import { open, screens, settings } from './fixtures';

test('the whole flow is buttons that send their action', async () => {
  const flow = [
    [screens.home, 'new_desktop'],
    [screens.progress, 'cancel'],
    [screens.in_use, 'reconnect'],
    [screens.countdown, 'destroy'],
    [screens.error, 'retry'],
  ] as const;
  for (const [screen, action] of flow) {
    const { button, backend, unmount } = await open(screen);
    await fireEvent.click(button(action)!);
    expect(backend.act.mock.calls).toEqual([[action]]);
    unmount();
  }
});

describe('focus', () => {
  test.each([
    ['home', 'new_desktop'],
    ['countdown', 'reconnect'],
    ['in_use', 'reconnect'],
    ['error', 'retry'],
  ] as const)('%s begins at %s', async (name, action) => {
    const { button } = await open(screens[name]);
    expect(document.activeElement).toBe(button(action));
  });

  test('a key held down on New desktop does not cancel it: progress begins at its heading', async () => {
    const { show } = await open(screens.home);
    await show(screens.progress);
    expect(document.activeElement?.tagName).toBe('H1');
  });

  test('a view that changes nothing of the screen takes no focus', async () => {
    const { show, button } = await open(screens.countdown);
    button('keep')!.focus();
    await show({ ...screens.countdown, remaining_s: 7 });
    expect(document.activeElement).toBe(button('keep'));
  });
});

test('Escape keeps the desktop', async () => {
  const { backend } = await open(screens.countdown);
  await fireEvent.keyDown(window, { key: 'Escape' });
  expect(backend.act).toHaveBeenCalledExactlyOnceWith('keep');
});

test('the bar tells its value', async () => {
  const { getByRole, show } = await open(screens.progress);
  expect(getByRole('progressbar').getAttribute('aria-valuenow')).toBe('42');
  await show({ ...screens.progress, fraction: 1.7 });
  expect(getByRole('progressbar').getAttribute('aria-valuenow')).toBe('100');
});

test('what a step is at is read where it stands, and heard unless it is one of many tasks', async () => {
  const { container, show } = await open({ ...screens.progress, detail: null, hint: null });
  const region = container.querySelector('[data-announcement]')!;
  const read = () => container.querySelector('.detail')?.textContent;
  expect(read()).toBe('');
  await show({ ...screens.progress, detail: { id: 'detail-storage', args: { place: 2 } }, hint: null });
  expect(read()).toBe('Waiting for the storage, number 2 in line');
  expect(region.textContent).toBe('Starting the machine Waiting for the storage, number 2 in line');
  for (const number of [1, 2]) {
    const detail = { id: 'detail-task', args: { number, name: 'Install packages' } };
    await show({ ...screens.progress, detail, hint: null });
    expect(read()).toBe(`Task ${number}: Install packages`);
    expect(region.textContent).toBe('Starting the machine');
  }
});

test('elapsed time runs on between two words of the launcher', async () => {
  vi.useFakeTimers({ toFake: ['setInterval', 'clearInterval', 'performance'] });
  try {
    const { container, settle } = await open({ ...screens.progress, elapsed_ms: 58_000, hint: null });
    expect(container.querySelector('.times')?.textContent).toContain('58 s');
    vi.advanceTimersByTime(7000);
    await settle();
    expect(container.querySelector('.times')?.textContent).toContain('1 min 05 s');
  } finally {
    vi.useRealTimers();
  }
});

test('a countdown is heard at its start and at 10, 5 and 0 seconds only', async () => {
  const { container, show } = await open({ ...screens.countdown, remaining_s: 30, total_s: 30 });
  const region = container.querySelector('[data-announcement]')!;
  const heard: string[] = [region.textContent!];
  for (let left = 29; left >= 0; left--) {
    await show({ ...screens.countdown, remaining_s: left, total_s: 30 });
    expect(container.querySelector('[data-announcement]')).toBe(region);
    if (heard.at(-1) !== region.textContent) heard.push(region.textContent!);
  }
  expect(heard).toEqual(['Destroying the desktop', '10 seconds left', '5 seconds left', '0 seconds left']);
});

test('a countdown of "never" shows no clock', async () => {
  const { queryByRole } = await open({ ...screens.countdown, remaining_s: null, total_s: null });
  expect(queryByRole('timer')).toBeNull();
});

test('an error shows the step that failed, the address, and copies its diagnostics', async () => {
  const { container, getByText, settle } = await open(screens.error);
  expect(container.querySelector('li.failed')?.textContent).toContain('failed');
  expect(container.querySelector('code')?.textContent).toBe('127.77.0.5:3389');
  const written = vi.fn(async () => {});
  vi.stubGlobal('navigator', { ...navigator, clipboard: { writeText: written } });
  await fireEvent.click(getByText('Copy diagnostics'));
  await settle();
  expect(written).toHaveBeenCalledExactlyOnceWith(screens.error.diagnostics);
  getByText('Copied');
  vi.unstubAllGlobals();
});

describe('settings', () => {
  test('are read, changed and saved as a whole', async () => {
    const { container, button, backend, settle } = await open(screens.home);
    await fireEvent.click(button('settings')!);
    await settle();
    await fireEvent.change(container.querySelector('[name=countdown]')!, { target: { value: 'never' } });
    await fireEvent.click(container.querySelector('[name=full_screen]')!);
    await fireEvent.input(container.querySelector('[name=client]')!, { target: { value: '/opt/xfreerdp' } });
    await fireEvent.submit(container.querySelector('form')!);
    await settle();
    expect(backend.saveSettings).toHaveBeenCalledExactlyOnceWith({
      ...settings,
      countdown: 'never',
      rdp: { ...settings.rdp, full_screen: true, client: '/opt/xfreerdp' },
    });
    expect(container.querySelector('main')?.dataset.screen).toBe('home');
  });

  test('that are refused stay, with the reason', async () => {
    const { container, button, backend, settle } = await open(screens.home);
    backend.saveSettings.mockRejectedValueOnce({ id: 'settings-not-an-address', args: { address: 'ftp://x' } });
    await fireEvent.click(button('settings')!);
    await settle();
    await fireEvent.submit(container.querySelector('form')!);
    await settle();
    expect(container.querySelector('[role=alert]')?.textContent).toContain('“ftp://x” is not an orchestrator address');
    const address = container.querySelector('[name=orchestrator]')!;
    expect(address.getAttribute('aria-invalid')).toBe('true');
    expect(document.activeElement).toBe(address);
    expect(container.querySelector('main')?.dataset.screen).toBe('settings');
  });

  test('give way when the launcher wants its main page', async () => {
    const { container, tell } = await open(screens.home);
    await tell({ news: 'page', page: 'settings' });
    await tell({ news: 'page', page: 'main' });
    expect(container.querySelector('main')?.dataset.screen).toBe('home');
  });
});
