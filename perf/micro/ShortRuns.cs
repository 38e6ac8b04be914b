using BenchmarkDotNet.Columns;
using BenchmarkDotNet.Configs;
using BenchmarkDotNet.Exporters;
using BenchmarkDotNet.Jobs;
using BenchmarkDotNet.Loggers;
using BenchmarkDotNet.Order;
using BenchmarkDotNet.Toolchains.InProcess.NoEmit;
using Perfolizer.Horology;

namespace Rollout.Micro;

/// <summary>
/// Few short iterations, in this process: all benchmarks together take minutes, and neither a network nor a second build is needed. Read
/// the median: on a shared machine the mean reflects other processes.
/// </summary>
internal sealed class ShortRuns : ManualConfig
{
    public ShortRuns()
    {
        AddJob(Job.Default.WithToolchain(InProcessNoEmitToolchain.DontLogOutput).WithWarmupCount(2).WithIterationCount(7)
            .WithIterationTime(TimeInterval.FromMilliseconds(60)).WithMinIterationCount(1));
        AddColumn(TargetMethodColumn.Method, StatisticColumn.Median, StatisticColumn.Min, new LimitColumn());
        AddColumnProvider(DefaultColumnProviders.Params);
        AddLogger(ConsoleLogger.Default);
        AddExporter(MarkdownExporter.GitHub);
        WithOrderer(new DefaultOrderer(SummaryOrderPolicy.Declared));
        WithArtifactsPath("artifacts/micro");
        WithOptions(ConfigOptions.JoinSummary | ConfigOptions.DisableLogFile);
    }
}
