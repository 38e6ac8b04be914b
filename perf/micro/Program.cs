using BenchmarkDotNet.Running;
using Rollout.Micro;

// `roofline` prints the tables of perf/ROOFLINE.md; everything else is BenchmarkDotNet's: --filter '*Sampling*', --list flat.
if (args is ["roofline"])
{
    await Roofline.PrintAsync(Environment.ProcessorCount, Console.Out);
    return 0;
}

BenchmarkSwitcher.FromAssembly(typeof(ShortRuns).Assembly).Run(args, new ShortRuns());
return 0;
