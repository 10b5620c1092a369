// The sources themselves: no word outside the catalogue, both catalogues alike.
import { readdirSync, readFileSync } from 'node:fs';
import { parse } from 'svelte/compiler';
import { expect, test } from 'vitest';
import { FluentResource } from '@fluent/bundle';

const sources = readdirSync('src', { recursive: true, encoding: 'utf8' }).filter((path) => /\.(svelte|ts)$/.test(path));

test.each(sources.filter((path) => path.endsWith('.svelte')))('%s has no literal text', (path) => {
  const found: string[] = [];
  const spoken = new Set(['alt', 'aria-label', 'aria-description', 'placeholder', 'title']);
  const walk = (node: unknown, attribute = ''): void => {
    if (Array.isArray(node)) return node.forEach((child) => walk(child, attribute));
    if (typeof node !== 'object' || node === null) return;
    const { type, name, data } = node as { type?: string; name?: string; data?: string };
    if (type === 'Text' && /\p{L}/u.test(data ?? '') && (attribute === '' || spoken.has(attribute))) found.push(data!);
    for (const child of Object.values(node)) walk(child, type === 'Attribute' ? name : attribute);
  };
  walk(parse(readFileSync(`src/${path}`, 'utf8'), { modern: true }).fragment);
  expect(found).toEqual([]);
});

test('every entry that a source names is in both catalogues', () => {
  const named = new Set(
    sources.flatMap((path) => readFileSync(`src/${path}`, 'utf8').match(/(?<=['"`])(app|window|settings|action|stage)-[a-z0-9-]*[a-z0-9](?=['"`])/g) ?? []),
  );
  expect(named.size).toBeGreaterThan(20);
  for (const language of ['en', 'fr']) {
    const text = readFileSync(`../session-manager/locales/${language}/mayfly.ftl`, 'utf8');
    const entries = new Set(new FluentResource(text).body.map((entry) => entry.id));
    expect([...named].filter((id) => !entries.has(id))).toEqual([]);
  }
});
