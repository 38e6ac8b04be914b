using System.Text;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>Wraps a device, by default the CPU, which a test can make fail, hold after a number of steps, or run out of memory.</summary>
internal sealed class ScriptedBackend(Backend? device = null) : DelegatingBackend(device ?? new CpuBackend(1))
{
    private readonly StringBuilder _order = new();
    private readonly ManualResetEventSlim _held = new();
    private readonly ManualResetEventSlim _letGo = new();
    private int _stepsUntilHeld = int.MaxValue;

    public int StepsLeft { get; set; } = int.MaxValue;

    public bool RehearsalsFail { get; set; }

    /// <summary>What each rehearsal adds to the memory that the device says is in use.</summary>
    public long GraphBytes { get; init; }

    private long _graphBytes;

    public override long HeldBytes => GraphBytes > 0 ? _graphBytes : base.HeldBytes;

    /// <summary>If set, weights are not written; their destinations and lengths are recorded here.</summary>
    public List<(long Element, int Bytes)>? Writes { get; set; }

    /// <summary>Whether restoring sleeping weights fails for lack of memory.</summary>
    public bool RestoresFail { get; set; }

    /// <summary>B for each step that began, F for each that was finished. Read it only while no step runs.</summary>
    public string Order => _order.ToString();

    /// <summary>The free memory that it reports.</summary>
    public long FreeBytes { get; set; } = long.MaxValue;

    public override long AvailableBytes => FreeBytes;

    /// <summary>The device's own, unless a test says.</summary>
    public long CacheBudget { get; set; } = -1;

    public override long KvCacheBudget => CacheBudget >= 0 ? CacheBudget : base.KvCacheBudget;

    public override string Name => "scripted";

    /// <summary>Lets this many steps begin and holds the loop at the next. Call it while no step runs.</summary>
    public void HoldAfter(int steps)
    {
        _held.Reset();
        _letGo.Reset();
        _stepsUntilHeld = steps;
    }

    public void WaitUntilHeld() => Assert.True(_held.Wait(TimeSpan.FromMinutes(1)), "the loop never came to the step at which it is held");

    /// <summary>Releases the loop, optionally up to the next step at which it is held.</summary>
    public void LetGo(int thenHoldAfter = int.MaxValue)
    {
        _stepsUntilHeld = thenHoldAfter;
        _held.Reset();
        _letGo.Set();
    }

    protected override WeightArena AllocateWeightsCore(IReadOnlyList<(int Outputs, int Inputs)> shapes)
        => new Arena(this, base.AllocateWeightsCore(shapes));

    protected override void WriteWeightCore(Weight destination, long element, ReadOnlySpan<byte> source, DType type)
    {
        if (Writes is null) base.WriteWeightCore(destination, element, source, type);
        else Writes.Add((element, source.Length));
    }

    protected override void BeginStepCore(StepLayout step)
    {
        if (step.IsRehearsal)
        {
            if (RehearsalsFail) throw new InvalidOperationException("no memory for graphs");
            _graphBytes += GraphBytes;
            base.BeginStepCore(step);
            return;
        }

        if (_stepsUntilHeld-- == 0)
        {
            _held.Set();
            if (!_letGo.Wait(TimeSpan.FromMinutes(1))) throw new TimeoutException("the test never let the loop go");
            _letGo.Reset();
        }

        if (StepsLeft-- == 0) throw new InvalidOperationException("device lost");
        _order.Append('B');
        base.BeginStepCore(step);
    }

    protected override void FinishStepCore(StepLayout step)
    {
        _order.Append('F');
        base.FinishStepCore(step);
    }

    private sealed class Arena(ScriptedBackend backend, WeightArena inner) : WeightArena(inner.Weights)
    {
        public override long Bytes => inner.Bytes;

        public override void Discard() => inner.Discard();

        public override void Restore()
        {
            if (backend.RestoresFail) throw new OutOfMemoryException("the trainer has it");
            inner.Restore();
        }

        public override void Dispose() => inner.Dispose();
    }
}
