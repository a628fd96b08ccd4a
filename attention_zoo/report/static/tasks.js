// What charts of trainings have in common: which task they are of, and how its values are written.
zoo.tasks = (() => {
  const words = zoo.words;
  const told = task => (task.share ? words.percent : words.fixed);
  const ofTask = task => run => zoo.ask(run, 'kind') === 'training' && zoo.ask(run, 'task') === task.title;
  const known = task => run => ofTask(task)(run) && !run.why && run.n.score !== undefined;
  const better = task => `${task.words} (${task.lower ? 'lower' : 'higher'} is better)`;
  const seed = run => `seed ${zoo.ask(run, 'seed') ?? '?'}`;

  // The task that a chart is of: the chosen one, or the first that holds what it draws; and a choice where several do.
  function chosen(holds) {
    const {left} = zoo.select.task(),
      wanted = zoo.state.get().task;
    const runs = zoo.select.shown().filter(holds);
    const able = left.filter(title => runs.some(run => zoo.ask(run, 'task') === title));
    const value = left.includes(wanted) ? able.find(title => title === wanted) : able[0];
    if (!value) return {};
    const choices =
      able.length < 2
        ? []
        : [
            zoo.choice(
              'Task',
              able.map(each => [each, each]),
              value,
              task => zoo.state.change({task}),
            ),
          ];
    return {task: zoo.select.taskOf(value), choices};
  }

  const yOf = (task, title) => (task.share ? zoo.gather.share(title) : {title});
  const caution = task => (task.obstacles.length ? ` Not compared: ${task.obstacles.join('; ')}.` : '');

  return {told, ofTask, known, better, seed, chosen, yOf, caution, log2: Math.log(2)};
})();
