// Builds the windows into `dist/`, which the tray app embeds; the same settings run the tests.
import { svelte } from '@sveltejs/vite-plugin-svelte';
import { svelteTesting } from '@testing-library/svelte/vite';
import { defineConfig } from 'vitest/config';

export default defineConfig({
  plugins: [svelte(), svelteTesting()],
  build: {
    // The oldest web views that Tauri 2 runs on; the policy allows no inlined file.
    target: ['es2022', 'safari16', 'chrome110'],
    assetsInlineLimit: 0,
    modulePreload: false,
  },
  server: { fs: { allow: ['..'] } },
  test: {
    environment: 'jsdom',
    include: ['test/**/*.test.ts'],
    // axe needs seconds on a busy machine.
    testTimeout: 60_000,
  },
});
