using BenchmarkDotNet.Columns;
using BenchmarkDotNet.Parameters;
using BenchmarkDotNet.Reports;
using BenchmarkDotNet.Running;
using Rollout.Kernels;

namespace Rollout.Micro;

/// <summary>The minimum work of an operation: arithmetic, and bytes that no cache holds.</summary>
internal readonly record struct Work(double Flops, double Bytes);

/// <summary>This machine's peak rates, measured once a run.</summary>
internal static class Machine
{
    // A limit is the best measured: other processes' load does not lower it.
    private const int Attempts = 3;

    private static readonly Lazy<(double Flops, double Bytes)> s_limits = new(() => (
        Enumerable.Range(0, Attempts).Max(_ => MachineLimits.MeasureFmaGflops(Environment.ProcessorCount)) * 1e9,
        Enumerable.Range(0, Attempts).Max(_ => MachineLimits.MeasureReadGBps(Environment.ProcessorCount)) * 1e9));

    public static double FlopsPerSecond => s_limits.Value.Flops;

    public static double BytesPerSecond => s_limits.Value.Bytes;

    /// <summary>The longer of its arithmetic at the peak of all cores and its bytes at the bandwidth of all cores.</summary>
    public static double FloorSeconds(Work work) => Math.Max(work.Flops / FlopsPerSecond, work.Bytes / BytesPerSecond);
}

/// <summary>A benchmark class whose methods have a floor on this machine.</summary>
internal interface IHasLimit
{
    /// <summary>The work of one call of the method with the current parameters.</summary>
    Work WorkOf(string method);
}

/// <summary>The floor of a benchmark divided by its median: 100% is the machine's limit.</summary>
internal sealed class LimitColumn : IColumn
{
    public string Id => nameof(LimitColumn);

    public string ColumnName => "Of limit";

    public bool AlwaysShow => true;

    public ColumnCategory Category => ColumnCategory.Custom;

    public int PriorityInCategory => 0;

    public bool IsNumeric => true;

    public UnitType UnitType => UnitType.Dimensionless;

    public string Legend => "the longer of flops / measured FMA peak and bytes / measured read bandwidth, divided by the median";

    public bool IsAvailable(Summary summary) => true;

    public bool IsDefault(Summary summary, BenchmarkCase benchmarkCase) => false;

    public string GetValue(Summary summary, BenchmarkCase benchmarkCase, SummaryStyle style) => GetValue(summary, benchmarkCase);

    public string GetValue(Summary summary, BenchmarkCase benchmarkCase)
    {
        if (summary[benchmarkCase]?.ResultStatistics is not { } statistics) return "";
        object instance = Activator.CreateInstance(benchmarkCase.Descriptor.Type)!;
        if (instance is not IHasLimit limited) return "";
        foreach (ParameterInstance parameter in benchmarkCase.Parameters.Items)
            benchmarkCase.Descriptor.Type.GetProperty(parameter.Name)!.SetValue(instance, parameter.Value);
        Work work = limited.WorkOf(benchmarkCase.Descriptor.WorkloadMethod.Name);
        double floor = Machine.FloorSeconds(work);
        string which = floor == 0 ? "" : work.Flops / Machine.FlopsPerSecond >= floor ? " FMA" : " read";
        return $"{floor / (statistics.Median / 1e9):P0}{which}";
    }
}
