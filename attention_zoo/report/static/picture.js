// A small picture of weights beside its name and its numbers, and a box of them that is painted again where it changed.
zoo.picture = (() => {
  // given: label; place, which of its pictures; group and key of its run (null: of none here);
  // said, [name, value] pairs; paint(canvas, size); file, note, data.
  function figure({label, place, group, key, said, paint, file, note, data}) {
    const title = place ? `${label}, ${place}` : label;
    const canvas = zoo.el('canvas', {
      role: 'img',
      'aria-label': `${title}: ${said.map(pair => pair.join(' ')).join(', ')}`,
    });
    paint(canvas, 4);
    const save = () => {
      const large = zoo.el('canvas');
      paint(large, 12);
      large.toBlob(blob => zoo.save(`${file}.png`.replace(/[^\w.-]+/g, '-'), blob));
    };
    return zoo.el(
      'figure',
      {
        class: 'picture',
        data: {group, ...data},
        onpointerenter: () => zoo.link.point({group, keys: key === null ? [] : [key]}),
        onpointerleave: () => zoo.link.point(null),
      },
      zoo.el(
        'figcaption',
        {},
        key === null
          ? zoo.el('span', {class: 'name'}, label)
          : zoo.button(label, () => zoo.link.choose(key), {class: 'plain'}),
        zoo.button('PNG', save, {'aria-label': `PNG: download the picture of ${title}`}),
      ),
      canvas,
      zoo.el('p', {class: 'note'}, note),
      zoo.el('details', {}, zoo.el('summary', {}, 'Numbers'), zoo.table(['', place || label], said)),
    );
  }

  // cells(i, j, context): the fill of each, set before it is painted.
  function grid(canvas, size, lines, columns, fill) {
    const context = canvas.getContext('2d');
    canvas.width = Math.max(1, columns) * size;
    canvas.height = Math.max(1, lines) * size;
    context.fillStyle = zoo.theme.ink().blank;
    context.fillRect(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < lines; i += 1)
      for (let j = 0; j < columns; j += 1) {
        fill(context, i, j);
        context.fillRect(j * size, i * size, size, size);
      }
  }

  // A box of pictures. told: what they depend on, and null for none at all; build: what is inside, as elements.
  function gallery(outer, inside, told, build) {
    let painted = '';
    function mark(what) {
      const pictures = [...inside.querySelectorAll('.picture')];
      const there = pictures.some(node => node.dataset.group === what?.group);
      for (const node of pictures) node.classList.toggle('faint', there && node.dataset.group !== what.group);
    }
    function draw() {
      const now = told();
      outer.hidden = now === null;
      const said = JSON.stringify([zoo.theme.dark(), now]);
      if (now === null || said === painted) return;
      painted = said;
      inside.replaceChildren(...build());
      mark(zoo.link.now());
    }
    const again = () => {
      painted = '';
      draw();
    };
    zoo.link.listen(mark);
    return {draw, again};
  }

  return {figure, grid, gallery};
})();
