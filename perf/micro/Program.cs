using BenchmarkDotNet.Running;
using Rollout.Load;
using Rollout.Micro;

// `roofline` prints the tables of perf/ROOFLINE.md; `cuda [N [STEPS [FOLDER]]]` times decode steps on GPU N, of Shape S or of the
// model whose config.json is in a folder; everything else is BenchmarkDotNet's: --filter '*Sampling*', --list flat.
if (args is ["roofline"])
{
    await Roofline.PrintAsync(Environment.ProcessorCount, Console.Out);
    return 0;
}

if (args is ["cuda", ..])
{
    int[] numbers = [.. args.Skip(1).Take(2).Select(number => int.Parse(number, System.Globalization.CultureInfo.InvariantCulture))];
    CudaSteps.Print(numbers.ElementAtOrDefault(0), numbers.Length > 1 ? numbers[1] : 200, args.ElementAtOrDefault(3) ?? ShapeS.Folder(), Console.Out);
    return 0;
}

if (args is ["host", ..])
{
    CudaHost.Print(args.Length > 1 ? int.Parse(args[1], System.Globalization.CultureInfo.InvariantCulture) : 500, Console.Out);
    return 0;
}

BenchmarkSwitcher.FromAssembly(typeof(ShortRuns).Assembly).Run(args, new ShortRuns());
return 0;
