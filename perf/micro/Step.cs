using BenchmarkDotNet.Attributes;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Load;

namespace Rollout.Micro;

/// <summary>
/// What does a whole decode step cost, and how close is it to the time of reading every weight once? `roofline` shows its time by part.
/// </summary>
public class Step : IHasLimit
{
    private const int Context = 128;
    private const int Layers = 24;
    private const double LayerWeights = Workload.Hidden * (Workload.QkvOutputs + Workload.Hidden + 3.0 * Workload.Intermediate);
    private const double Weights = Layers * LayerWeights + (double)Workload.Hidden * Workload.Vocabulary;

    private CpuBackend _backend = null!;
    private Transformer _transformer = null!;
    private Workspace _workspace = null!;
    private WeightSet _weights = null!;
    private KvCache _cache = null!;
    private StepLayout _step = null!;

    [Params(1, 8, 16, 32, 64)]
    public int Batch { get; set; }

    [GlobalSetup]
    public void Setup()
    {
        ModelSpec model = ModelSpec.Load(ShapeS.Folder());
        _transformer = new Transformer(model);
        _backend = new CpuBackend();
        _weights = WeightSet.Allocate(_backend, _transformer.Weights);
        foreach (Weight weight in _weights.All) Workload.Fill(_backend, weight);
        _cache = _backend.AllocateKvCache(Batch * Workload.BlocksOf(Context), _transformer.Kv);
        _workspace = _transformer.AllocateWorkspace(_backend, Batch, Context);
        _step = Workload.DecodeStep(Batch, Context);
    }

    [Benchmark]
    public void Decode()
    {
        _transformer.Forward(_step, _weights, _cache, _workspace);
        _transformer.Sample(_step, _weights, _workspace);
        _backend.FinishStep(_step);
    }

    [GlobalCleanup]
    public void Cleanup()
    {
        _workspace.Dispose();
        _cache.Dispose();
        _weights.Dispose();
        _backend.Dispose();
    }

    Work IHasLimit.WorkOf(string method) => new(
        Batch * (2 * Weights + 4.0 * Layers * Workload.Heads * Workload.HeadDim * Context),
        2 * Weights + 2.0 * sizeof(float) * Layers * Workload.KvHeads * Workload.HeadDim * Batch * Context);
}
