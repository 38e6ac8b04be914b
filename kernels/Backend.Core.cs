using System.Runtime.CompilerServices;

namespace Rollout.Kernels;

/// <summary>The part of a backend that a device implements, and what it can use.</summary>
public abstract partial class Backend
{
    // ---- What a device implements. Arguments have been checked: memory is the device's own, shapes fit.

    protected abstract void DisposeCore();

    protected abstract Tensor AllocateTensorCore(int rows, int columns, bool rounded);

    protected abstract Weight AllocateWeightCore(int outputs, int inputs);

    /// <summary>Allocates them one by one; a device that keeps them together overrides this.</summary>
    protected virtual WeightArena AllocateWeightsCore(IReadOnlyList<(int Outputs, int Inputs)> shapes)
    {
        List<Weight> weights = new(shapes.Count);
        try
        {
            foreach ((int outputs, int inputs) in shapes)
                weights.Add(AllocateWeightCore(outputs, inputs));
        }
        catch
        {
            weights.ForEach(weight => weight.Dispose());
            throw;
        }

        return new WeightArena(weights);
    }

    protected abstract KvCache AllocateKvCacheCore(int blocks, IReadOnlyList<KvLayout> layers);

    protected abstract RopeTable AllocateRopeTableCore(ReadOnlySpan<float> inverseFrequencies, int positions);

    protected abstract void WriteWeightCore(Weight destination, long element, ReadOnlySpan<byte> source, DType type);

    protected abstract void WriteWeightElementsCore(
        Weight destination, long element, ReadOnlySpan<uint> indices, ReadOnlySpan<byte> values, DType type);

    protected abstract void CopyWeightCore(Weight source, Weight destination);

    protected abstract void ReadWeightCore(Weight source, long element, Span<float> destination);

    /// <summary>Another step begins: operations of this one that are not queued on the device yet are queued.</summary>
    protected virtual void LeaveStepCore()
    {
    }

    protected abstract void BeginStepCore(StepLayout step);

    protected abstract void EmbedCore(Weight table, Tensor output);

    protected abstract void RmsNormCore(Tensor input, Weight scale, float epsilon, Tensor output, int rows);

    protected abstract void RmsNormAddCore(Tensor input, Weight scale, float epsilon, Tensor residual, int rows);

    /// <param name="input">[rows, inputs].</param>
    /// <param name="weight">[outputs, inputs].</param>
    /// <param name="bias">[outputs].</param>
    /// <param name="output">[rows, outputs]; not the input.</param>
    /// <param name="rows">At least 1.</param>
    /// <param name="add">Whether the sums are added to what <paramref name="output"/> holds.</param>
    protected abstract void MatMulCore(Tensor input, Weight weight, Weight? bias, Tensor output, int rows, bool add);

    protected abstract void AttentionCore(in AttentionCall call);

    protected abstract void GatedSiluCore(Tensor gateUp, Tensor output, int rows);

    protected abstract void GatherRowsCore(Tensor input, int first, int count, Tensor output);

    /// <param name="logits">[count, vocab].</param>
    /// <param name="first">Output row that logits[0] belongs to.</param>
    /// <param name="count">Output rows.</param>
    /// <param name="begin">First of the step's queries about these rows.</param>
    /// <param name="end">One past the last of them.</param>
    protected abstract void SampleCore(Tensor logits, int first, int count, int begin, int end);

    protected abstract void FinishStepCore(StepLayout step);

    protected abstract void CopyBlockCore(KvCache cache, int from, int to);

    // ---- What a device can use.

    /// <summary>The step that has begun.</summary>
    /// <exception cref="InvalidOperationException">None has.</exception>
    protected StepLayout Step
    {
        get
        {
            ThrowIfDisposed();
            return _step ?? throw new InvalidOperationException($"{nameof(BeginStep)} comes first.");
        }
    }

    /// <summary>The same, or null where none has begun.</summary>
    protected StepLayout? StepOrNull => _step;

    /// <summary>[rows of the largest step so far]: the sequence of each of the step's rows.</summary>
    protected int[] RowSequence { get; private set; } = [];

    /// <summary>Number of queries of the previous step whose answers may be tokens of this one.</summary>
    protected internal virtual int EarlierAnswers => 0;

    protected void ThrowIfDisposed() => ObjectDisposedException.ThrowIf(_disposed, this);

    // ---- Checks that memory is this backend's, not disposed or discarded, and of the needed shape.

    internal virtual bool Owns(DeviceMemory memory) => ReferenceEquals(memory.Owner, this);

    internal void Own(DeviceMemory memory, [CallerArgumentExpression(nameof(memory))] string? name = null)
    {
        ArgumentNullException.ThrowIfNull(memory, name);
        if (!Owns(memory) || memory.IsGone)
            throw new ArgumentException("Memory of another backend, disposed, or discarded.", name);
    }

    /// <param name="tensor">Has at least <paramref name="rows"/> rows.</param>
    /// <param name="rows">Rows that are used.</param>
    /// <param name="columns">Columns it has; 0: any number.</param>
    /// <param name="name">The caller's name for it.</param>
    private void Own(Tensor tensor, int rows, int columns = 0, [CallerArgumentExpression(nameof(tensor))] string? name = null)
    {
        Own((DeviceMemory)tensor, name);
        if (rows < 0 || rows > tensor.Rows)
            throw new ArgumentOutOfRangeException(name, rows, $"The tensor has {tensor.Rows} rows.");
        if (columns != 0 && columns != tensor.Columns)
            throw new ArgumentException($"{tensor.Columns} columns, needed {columns}.", name);
    }

    private void OwnMatrix(Weight weight, [CallerArgumentExpression(nameof(weight))] string? name = null)
    {
        Own((DeviceMemory)weight, name);
        if (weight.IsVector)
            throw new ArgumentException("A vector, needed a matrix.", name);
    }

    private void OwnVector(Weight weight, int length, [CallerArgumentExpression(nameof(weight))] string? name = null)
    {
        Own((DeviceMemory)weight, name);
        if (!weight.IsVector || weight.Inputs != length)
            throw new ArgumentException($"[{weight.Outputs}, {weight.Inputs}], needed a vector of {length}.", name);
    }

    /// <summary>Of one head, or of all of them together.</summary>
    private void OwnHeadNorm(Weight? norm, int keyDim, int heads, [CallerArgumentExpression(nameof(norm))] string? name = null)
    {
        if (norm is null)
            return;
        Own((DeviceMemory)norm, name);
        if (!norm.IsVector || (norm.Inputs != keyDim && norm.Inputs != heads * keyDim))
            throw new ArgumentException($"[{norm.Outputs}, {norm.Inputs}], needed a vector of {keyDim} or {heads * keyDim}.", name);
    }

    private void CheckMatMul(Tensor input, Weight weight, Weight? bias, int rows)
    {
        ThrowIfDisposed();
        OwnMatrix(weight);
        Own(input, rows, weight.Inputs);
        if (bias is not null)
            OwnVector(bias, weight.Outputs);
    }
}
