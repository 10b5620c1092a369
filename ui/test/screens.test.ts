// Every screen in both languages: complete, without an entry that the catalogue lacks, and clean for axe.
import axe from 'axe-core';
import { describe, expect, test } from 'vitest';
import { languages, open, screens } from './fixtures';

async function complaints(container: Element): Promise<string[]> {
  // Colours need a real renderer: the test that drives the real window checks them.
  const { violations } = await axe.run(container.ownerDocument, { rules: { 'color-contrast': { enabled: false } } });
  return violations.map((violation) => `${violation.id}: ${violation.nodes.map((node) => node.html).join(' ')}`);
}

const unknownEntry = /\b(action|detail|stage|window|settings|app)-[a-z]/;

describe.each(languages)('in %s', (language) => {
  test.each(Object.values(screens))('$screen is complete', async (screen) => {
    const { container } = await open(screen, language);
    expect(container.querySelector('main')?.dataset.screen).toBe(screen.screen);
    expect(container.querySelector('h1')?.textContent).toMatch(/\p{L}/u);
    expect(container.textContent).not.toMatch(unknownEntry);
    expect(container.innerHTML.match(/(aria-label|title|placeholder)="(action|stage|window|settings|app)-/)).toBeNull();
    expect(document.documentElement.lang).toBe(language);
    expect(await complaints(container)).toEqual([]);
  });

  test('the settings are complete', async () => {
    const { container, tell } = await open(screens.home, language);
    await tell({ news: 'page', page: 'settings' });
    expect(container.querySelectorAll('input, select')).toHaveLength(8);
    expect(container.textContent).not.toMatch(unknownEntry);
    expect(await complaints(container)).toEqual([]);
  });
});

test('the same screen speaks the two languages', async () => {
  const english = (await open(screens.home, 'en')).button('new_desktop')?.textContent;
  const french = (await open(screens.home, 'fr')).button('new_desktop')?.textContent;
  expect([english?.trim(), french?.trim()]).toEqual(['New desktop', 'Nouveau bureau']);
});

test('a plural is right at one second', async () => {
  const label = async (language: string) => {
    const { container, unmount } = await open({ ...screens.countdown, remaining_s: 1 }, language);
    const text = container.querySelector('[role=timer]')?.getAttribute('aria-label');
    unmount();
    return text;
  };
  expect(await label('en')).toBe('1 second left');
  expect(await label('fr')).toBe('1 seconde restante');
});
