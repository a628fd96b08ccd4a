// Numbers as people read them, as in units.py: three significant figures, binary bytes, units always said.
zoo.words = (() => {
  const none = '–';
  const made = new Map(); // to make a format takes longer than to use it a thousand times
  const formats = places => {
    if (!made.has(places))
      made.set(places, new Intl.NumberFormat('en', {minimumFractionDigits: places, maximumFractionDigits: places}));
    return made.get(places);
  };
  const significant = (value, digits = 3) => {
    if (!value || !isFinite(value)) return String(value);
    const places = digits - 1 - Math.floor(Math.log10(Math.abs(value)));
    const factor = 10 ** places;
    return formats(Math.min(Math.max(places, 0), 20)).format(Math.round(value * factor) / factor);
  };
  const scaled = (steps, value) => {
    const [, factor, unit] = steps.find(([limit]) => value < limit);
    return `${significant(value / factor)}${unit}`;
  };
  const seconds = value =>
    scaled(
      [
        [1e-3, 1e-6, ' µs'],
        [1, 1e-3, ' ms'],
        [120, 1, ' s'],
        [Infinity, 60, ' min'],
      ],
      value,
    );
  const size = value =>
    scaled(
      [
        [2 ** 10, 1, ' B'],
        [2 ** 20, 2 ** 10, ' KiB'],
        [2 ** 30, 2 ** 20, ' MiB'],
        [2 ** 40, 2 ** 30, ' GiB'],
        [Infinity, 2 ** 40, ' TiB'],
      ],
      value,
    );
  const millions = value =>
    scaled(
      [
        [1e3, 1, ''],
        [1e6, 1e3, ' k'],
        [1e9, 1e6, ' M'],
        [Infinity, 1e9, ' G'],
      ],
      value,
    );
  const count = value => formats(0).format(Math.round(value));
  const percent = value => `${(100 * value).toFixed(1)} %`;
  const fixed = value => value.toFixed(3);
  const times = value => `${significant(value)}×`;
  const whole = said => said.replace(/\.0+(?!\d)/, '');
  // The words of a figure by its name.
  const of = name => {
    if (/seconds(_min|_max)?$/.test(name)) return seconds;
    if (/bytes(_per_token)?$/.test(name) && !name.startsWith('metrics.')) return size;
    if (/ratio(_min|_max)?$/.test(name)) return times;
    if (/parameters|flops|tokens_per_second/.test(name)) return millions;
    if (/accuracy|exact_match/.test(name)) return percent;
    return name === 'steps' || name === 'length' ? count : fixed;
  };
  return {none, significant, seconds, size, millions, count, percent, fixed, times, whole, of};
})();
