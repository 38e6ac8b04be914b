using BenchmarkDotNet.Running;
using Rollout.Micro;

// `roofline` prints the tables of perf/ROOFLINE.md; `host [STEPS]` times the host's part of a GPU's decode step; everything else is
// BenchmarkDotNet's: --filter '*Sampling*', --list flat.
if (args is ["roofline"])
{
    await Roofline.PrintAsync(Environment.ProcessorCount, Console.Out);
    return 0;
}

if (args is ["host", ..])
{
    CudaHost.Print(args.Length > 1 ? int.Parse(args[1], System.Globalization.CultureInfo.InvariantCulture) : 500, Console.Out);
    return 0;
}

BenchmarkSwitcher.FromAssembly(typeof(ShortRuns).Assembly).Run(args, new ShortRuns());
return 0;
