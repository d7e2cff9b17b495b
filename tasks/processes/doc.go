// Package processes runs the programs of steps and sees to it that nothing
// of them survives: not the program, not what it has started, not what has
// left its process group, and not when this process itself is killed.
//
// Four things work together, each for what the others cannot see:
//
//   - A process group of its own for each program, so that a signal reaches
//     all that did not ask for another one.
//   - The parent-death signal: should this process die, the kernel kills the
//     program at once.
//   - [Adopt] makes this process the one that orphans of its descendants are
//     given to, instead of init. What has left the group by double forking and
//     setsid is found among its children.
//   - A [Variable] in the environment that says whose it is. It tells the
//     programs of concurrent steps apart, by it [EndLeftovers] finds at the
//     next start what a killed worker has left, and [EndRivals] what one that
//     has lost a step still runs of it.
//
// What the package cannot end: a process of another user (a setuid program)
// and, after a kill of the worker, a grandchild that has emptied its
// environment. In a container whose first process is the worker the kernel
// ends these too.
//
// On systems other than Linux there is the process group and nothing else.
//
// It knows no runs and no commands: package orchestrator does.
package processes
