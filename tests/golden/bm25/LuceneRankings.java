import java.io.BufferedReader;
import java.io.IOException;
import java.io.PrintWriter;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import org.apache.lucene.analysis.Analyzer;
import org.apache.lucene.analysis.TokenStream;
import org.apache.lucene.analysis.en.EnglishAnalyzer;
import org.apache.lucene.analysis.standard.StandardAnalyzer;
import org.apache.lucene.analysis.tokenattributes.CharTermAttribute;
import org.apache.lucene.document.Document;
import org.apache.lucene.document.Field;
import org.apache.lucene.document.TextField;
import org.apache.lucene.index.DirectoryReader;
import org.apache.lucene.index.IndexWriter;
import org.apache.lucene.index.IndexWriterConfig;
import org.apache.lucene.index.Term;
import org.apache.lucene.search.BooleanClause;
import org.apache.lucene.search.BooleanQuery;
import org.apache.lucene.search.IndexSearcher;
import org.apache.lucene.search.ScoreDoc;
import org.apache.lucene.search.TermQuery;
import org.apache.lucene.search.TopScoreDocCollector;
import org.apache.lucene.search.similarities.BM25Similarity;
import org.apache.lucene.store.ByteBuffersDirectory;
import org.apache.lucene.util.Version;

/**
 * Top rankings of Lucene itself, as make_goldens.py wants them.
 *
 * <p>Arguments: analyzer, passages, queries, top_k. Both files hold one text per line. Prints Lucene's version, then one
 * line per query: "position:score" per hit, best first. A query is what Elasticsearch's match query makes of it: SHOULD
 * over its analysed terms, one clause per term, those that stand twice included.
 */
public final class LuceneRankings {
  public static void main(String[] arguments) throws IOException {
    // Elasticsearch's "standard" analyzer has no stop words; Lucene 8's StandardAnalyzer has none either.
    Analyzer analyzer = arguments[0].equals("english") ? new EnglishAnalyzer() : new StandardAnalyzer();
    ByteBuffersDirectory directory = new ByteBuffersDirectory();
    IndexWriterConfig config = new IndexWriterConfig(analyzer).setSimilarity(new BM25Similarity());
    try (IndexWriter writer = new IndexWriter(directory, config);
        BufferedReader passages = Files.newBufferedReader(Path.of(arguments[1]), StandardCharsets.UTF_8)) {
      for (String line = passages.readLine(); line != null; line = passages.readLine()) {
        Document document = new Document();
        document.add(new TextField("contents", line, Field.Store.NO));
        writer.addDocument(document);
      }
      writer.forceMerge(1);
    }
    PrintWriter out = new PrintWriter(System.out, true, StandardCharsets.UTF_8);
    try (DirectoryReader reader = DirectoryReader.open(directory)) {
      IndexSearcher searcher = new IndexSearcher(reader);
      searcher.setSimilarity(new BM25Similarity());
      out.println(Version.LATEST);
      for (String query : Files.readAllLines(Path.of(arguments[2]), StandardCharsets.UTF_8)) {
        out.println(ranking(searcher, terms(analyzer, query), Integer.parseInt(arguments[3])));
      }
    }
  }

  private static List<String> terms(Analyzer analyzer, String text) throws IOException {
    List<String> terms = new ArrayList<>();
    try (TokenStream stream = analyzer.tokenStream("contents", text)) {
      CharTermAttribute term = stream.addAttribute(CharTermAttribute.class);
      stream.reset();
      while (stream.incrementToken()) {
        terms.add(term.toString());
      }
      stream.end();
    }
    return terms;
  }

  private static String ranking(IndexSearcher searcher, List<String> terms, int topK) throws IOException {
    BooleanQuery.Builder query = new BooleanQuery.Builder();
    for (String term : terms) {
      query.add(new TermQuery(new Term("contents", term)), BooleanClause.Occur.SHOULD);
    }
    // Counts every hit, so that nothing is skipped; equal scores keep the order of the documents.
    TopScoreDocCollector collector = TopScoreDocCollector.create(topK, Integer.MAX_VALUE);
    searcher.search(query.build(), collector);
    List<String> hits = new ArrayList<>();
    for (ScoreDoc hit : collector.topDocs().scoreDocs) {
      hits.add(hit.doc + ":" + hit.score);
    }
    return String.join(" ", hits);
  }
}
