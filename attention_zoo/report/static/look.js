// Colours of the theme, and the sign of a line.
zoo.theme = (() => {
  const system = matchMedia('(prefers-color-scheme: dark)');
  let paper = false;
  const dark = () => !paper && (zoo.state.get().theme || (system.matches ? 'dark' : 'light')) === 'dark';
  const color = style => (style ? style[dark() ? 1 : 0] : ink().muted);
  const ink = () =>
    dark()
      ? {ink: '#e6e8eb', muted: '#98a1ad', grid: '#2b3038', paper: '#171a1f', blank: '#1f242b'}
      : {ink: '#20242a', muted: '#5f6772', grid: '#e4e7eb', paper: '#fefefe', blank: '#f0f2f5'};

  function apply() {
    const {theme} = zoo.state.get();
    document.documentElement.dataset.theme = dark() ? 'dark' : 'light';
    const button = zoo.by('theme');
    if (button) button.textContent = `Theme: ${theme || 'as the system'}`;
  }

  function start(changed) {
    zoo.by('theme').addEventListener('click', () => {
      const next = {'': 'dark', dark: 'light', light: ''};
      zoo.state.change({theme: next[zoo.state.get().theme]});
    });
    const again = () => {
      apply();
      changed();
    };
    system.addEventListener('change', again);
    for (const [name, value] of [
      ['beforeprint', true],
      ['afterprint', false],
    ]) {
      addEventListener(name, () => {
        paper = value;
        again();
      });
    }
    zoo.state.listen(names => {
      if (names.has('theme')) again();
    });
    apply();
  }

  return {dark, color, ink, start, apply};
})();

zoo.swatch = style => {
  const space = 'http://www.w3.org/2000/svg';
  const shapes = {
    circle: 'M14 3a4 4 0 1 0 .01 0z',
    square: 'M10 3h8v8h-8z',
    diamond: 'M14 2l5 5-5 5-5-5z',
    'triangle-up': 'M14 2.5l5 8.5H9z',
    'triangle-down': 'M14 11.5l5-8.500H9z',
    hexagon: 'M14 2.200l4.300 2.400v4.800L14 11.800 9.700 9.400V4.600z',
    star: 'M14 2l1.400 3.400 3.600.300-2.800 2.300.900 3.600-3.100-2-3.100 2 .900-3.600L9 5.700l3.600-.300z',
    cross: 'M12.400 2.500h3.200v2.900h2.900v3.200h-2.900v2.900h-3.200V8.600H9.500V5.400h2.900z',
  };
  const [, , marker = 'circle', dash = 'solid'] = style ?? [];
  const color = zoo.theme.color(style);
  const draw = (tag, given) => {
    const node = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(given)) node.setAttribute(name, value);
    return node;
  };
  const svg = draw('svg', {width: 28, height: 14, 'aria-hidden': 'true', class: 'swatch'});
  const dashes = {solid: '', dash: '5 3', dot: '1.5 2.5', dashdot: '5 2 1.5 2'};
  svg.append(draw('path', {d: 'M1 7h26', stroke: color, 'stroke-width': 2, 'stroke-dasharray': dashes[dash] ?? ''}));
  const hollow = marker.endsWith('-open');
  svg.append(
    draw('path', {
      d: shapes[marker.replace('-open', '')] ?? shapes.circle,
      stroke: color,
      'stroke-width': 1.5,
      fill: hollow ? zoo.theme.ink().paper : color,
    }),
  );
  return svg;
};
