// Package processes runs the programs of steps and makes sure that no process
// survives its step: neither the program, nor what it has started, nor a
// process that has left the process group. This also holds when the worker
// itself is killed.
//
// Four mechanisms work together, because each covers what the others miss:
//
//   - Each program has a process group of its own. A signal to the group
//     reaches every process that did not ask for another one.
//   - The parent-death signal: if the worker dies, the kernel kills the program
//     at once.
//   - [Adopt] makes the worker the subreaper of its descendants: their orphans
//     become its children instead of init's. So it finds processes that have
//     left the group by double forking and setsid.
//   - [Variable] in the environment names the worker, run and step that a
//     process belongs to. It distinguishes the programs of concurrent steps.
//     [EndLeftovers] uses it at a worker's start to find what a killed worker
//     has left running, and [EndOtherWorkersPrograms] to find what a worker
//     still runs of a step whose claim it has lost.
//
// The package cannot end two kinds of process: that of another user (a setuid
// program) and, after the worker was killed, a grandchild that has emptied its
// environment. In a container whose first process is the worker, the kernel
// ends these too.
//
// On systems other than Linux only the process group is available.
//
// The package does not know what runs, steps and commands mean: package
// orchestrator does.
package processes
