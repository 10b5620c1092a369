// A time that the launcher told, and that runs on between two of its words.

/** Milliseconds that follow `told` and grow by themselves, once a second, while the component lives. */
export function running(told: () => number): { readonly ms: number } {
  let ms = $state(told());
  $effect(() => {
    const base = told();
    const at = performance.now();
    ms = base;
    const timer = setInterval(() => (ms = base + performance.now() - at), 1000);
    return () => clearInterval(timer);
  });
  return {
    get ms() {
      return ms;
    },
  };
}
